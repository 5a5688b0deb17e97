# SPDX-License-Identifier: MIT
"""Agentic post-training in kind and at small scale; docs/agentic.md tells the story."""
