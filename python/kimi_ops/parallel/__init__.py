# SPDX-License-Identifier: MIT
"""Experts spread over ranks: the public classes are in `kimi_ops`, their errors here."""

from kimi_ops.parallel.errors import (
    EPError,
    EPMismatch,
    EPMisuse,
    EPOverflow,
    EPPeerError,
    EPRankLost,
    EPTimeout,
)

__all__ = [
    "EPError",
    "EPMismatch",
    "EPMisuse",
    "EPOverflow",
    "EPPeerError",
    "EPRankLost",
    "EPTimeout",
]
