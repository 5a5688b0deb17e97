# SPDX-License-Identifier: MIT
"""Matrices of known singular values, and what Newton-Schulz makes of those."""

import functools

import torch


@functools.cache
def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(
        rows, columns, dtype=torch.float64, generator=generator, device=generator.device
    )
    return torch.linalg.qr(square)[0]


def known_matrix(m: int, n: int, spectrum: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """G = U diag(s) V^T in fp64, with its factors."""
    u, v = orthonormal(m, min(m, n), seed), orthonormal(n, min(m, n), seed + 1)
    return u @ torch.diag(spectrum) @ v.T, u, v


def through_polynomials(s: torch.Tensor, rows: tuple, scale: float = 1.0) -> torch.Tensor:
    s = scale * s / s.norm()
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return s


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.double() - ref).norm() / ref.norm())


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)
