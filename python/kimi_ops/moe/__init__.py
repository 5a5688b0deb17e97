# SPDX-License-Identifier: MIT
"""Routing and experts: the public functions are in `kimi_ops`."""
