# SPDX-License-Identifier: MIT
"""Newton-Schulz orthogonalisation in plain PyTorch: the oracle of the native engines.

One step on X [m, n], m <= n:      A = X X^T,  B = b A + c A^2,  X <- a X + B X

which maps every singular value s to a s + b s^3 + c s^5 and leaves the singular vectors alone.
Cost of K steps: K (4 m^2 n + 2 m^3) floating-point operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's triple, the one of torch.optim.Muon


def _guarded(rows: tuple[Triple, ...], safety: float = 1.01) -> tuple[Triple, ...]:
    """Every row but the last applied to x / safety.

    Schedules tuned for singular values up to exactly 1 are steep there (|p'| = 26): one bf16
    rounding above 1, as a matrix of rank one meets it, and the iteration diverges.
    """
    scaled = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1])
    return scaled + rows[-1:]


# Polar Express (arXiv 2505.16932), minimax polynomials for singular values in [1e-3, 1].
_POLAR_EXPRESS = (
    (8.28721, -23.59589, 17.30039),
    (4.10706, -2.94785, 0.54484),
    (3.94869, -2.90890, 0.55182),
    (3.31842, -2.48849, 0.51005),
    (2.30065, -1.66890, 0.41881),
    (1.89130, -1.26800, 0.37680),
    (1.87500, -1.25000, 0.37500),
    (1.87500, -1.25000, 0.37500),
)

# Schedules whose last row may be repeated: any number of steps makes sense.
OPEN_SCHEDULES: dict[str, tuple[Triple, ...]] = {
    "quintic": (_QUINTIC,),
    "polar_express": _guarded(_POLAR_EXPRESS),
}
# Schedules tuned as a whole: they mean something only with all their rows.
FIXED_SCHEDULES: dict[str, tuple[Triple, ...]] = {
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "cans": _guarded(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        )
    ),
    "deepseek_v4": (_QUINTIC,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    "cubic": (
        (3.36566, -3.34210, 0.0),
        (2.57445, -1.49574, 0.0),
        (2.53690, -1.43126, 0.0),
        (2.44189, -1.27640, 0.0),
        (2.22305, -0.96307, 0.0),
    ),
}
SCHEDULES: dict[str, tuple[Triple, ...]] = {**OPEN_SCHEDULES, **FIXED_SCHEDULES}


def normalize(x: Tensor, eps: float = 0.0) -> Tensor:
    """x [..., m, n] over its Frobenius norm, the sum taken in fp32 (fp64 for fp64).

    The matrix is first scaled by a power of two that brings its largest entry into [0.5, 1): exact,
    so that neither tiny nor huge entries leave the range of the squares, and 2^k x gives the very
    bits of x. A zero matrix stays zero.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        largest = x.abs().amax(dim=(-2, -1), keepdim=True)
        exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    x = torch.ldexp(x, -exponent)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    if eps > 0:
        norm = norm.clamp(min=torch.ldexp(torch.full_like(largest, eps), -exponent))
    return x / torch.where(norm == 0, 1.0, norm)


def newton_schulz(
    g: Tensor, rows: Sequence[Triple], *, dtype: torch.dtype = torch.bfloat16, eps: float = 0.0
) -> Tensor:
    """The image of g [..., m, n] under the odd polynomials `rows`, computed in `dtype`, returned as
    g.dtype.

    One matrix at a time: a batched product may sum in another order than a single one, and a matrix
    must not change its bits with the company it comes in.
    """
    if g.numel() == 0:
        return torch.zeros_like(g)
    matrices = g.reshape(-1, *g.shape[-2:]).unbind(0)
    return torch.stack([_one_matrix(matrix, rows, dtype, eps) for matrix in matrices]).reshape(
        g.shape
    )


def _one_matrix(g: Tensor, rows: Sequence[Triple], dtype: torch.dtype, eps: float) -> Tensor:
    tall = g.shape[0] > g.shape[1]
    # contiguous(): a matrix and its transpose take the same road, bit for bit
    x = normalize((g.T if tall else g).contiguous(), eps).to(dtype)
    for a, b, c in rows:
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=b, alpha=c) if c != 0 else b * gram
        x = torch.addmm(x, update, x, beta=a)
    return (x.T if tall else x).to(g.dtype)
