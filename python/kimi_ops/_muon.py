# SPDX-License-Identifier: MIT
"""The seam below Newton-Schulz and MuonClip: every product, every chain of products and every
elementwise pass goes through one of these functions, so an engine that replaces one serves all
callers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import newton_schulz as twin
from kimi_ops.reference.muon_clip import adamw_, apply_, momentum_

__all__ = [
    "adamw_",
    "apply_",
    "cheapest",
    "matmul",
    "momentum_",
    "orthogonalize",
    "symmetric_matmul",
    "syrk",
]

Triple = tuple[float, float, float]


def syrk(a: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha a a^T + beta c, lower triangle computed and mirrored; a [m, k]."""
    return twin.syrk(a, c, alpha, beta)


def symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b + beta c where that is symmetric, lower triangle computed and mirrored; [m, m]."""
    return twin.symmetric_matmul(a, b, c, alpha, beta)


def matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b + beta c; a [m, k], b [k, n]."""
    return twin.matmul(a, b, c, alpha, beta)


def cheapest(m: int, n: int, dtype: torch.dtype) -> str:
    """The method that ``auto`` means for matrices with sides m <= n: the fastest here.

    Measured on a CPU: plain products with a symmetric result save nothing, and the Gram form, which
    bf16 is too coarse for, wins where its larger products pay for its more numerous small ones.
    """
    exact = dtype in (torch.float32, torch.float16)
    return "gram" if exact and m >= 192 and n >= 3 * m else "standard"


def orthogonalize(
    matrices: Sequence[Tensor],
    rows: tuple[Triple, ...],
    *,
    method: str,
    restarts: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
) -> list[Tensor]:
    """The chains of independent matrices [m, n] of any strides, each result in its matrix's dtype.

    A result must not depend on the other matrices of the call.
    """
    engine: Any = sys.modules[__name__]
    return [
        twin.newton_schulz(
            matrix,
            rows,
            method=method,
            restarts=restarts,
            dtype=dtype,
            eps=eps,
            products=engine,
        )
        for matrix in matrices
    ]
