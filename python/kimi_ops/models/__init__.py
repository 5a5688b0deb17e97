# SPDX-License-Identifier: MIT
"""Reference models built from the ops of this library."""
