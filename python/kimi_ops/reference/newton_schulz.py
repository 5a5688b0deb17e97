# SPDX-License-Identifier: MIT
r"""Newton-Schulz orthogonalisation in plain PyTorch: the oracle of the native engines.

One step on X [m, n], m <= n:      A = X X^T,  B = b A + c A^2,  X <- a X + B X

which maps every singular value s to a s + b s^3 + c s^5 and leaves the singular vectors alone.
With `aol` X is first D X, and A for it D A D: D is the diagonal of 1 / sqrt(sum_j |X X^T|_ij).

    standard   as written                                     K (4 m^2 n + 2 m^3) operations
    symmetric  A and B by their lower triangles, mirrored     K (3 m^2 n +   m^3)
    gram       R = X X^T once; W = a + b R + c R^2 commutes with R, so R <- W R W and Q <- W Q are
               all [m, m], and X <- Q X stands at the end and at every restart
                                          3 (1 + restarts) m^2 n + (4 K - 3 (1 + restarts)) m^3

Nothing here is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Triple = tuple[float, float, float]
Product = Callable[..., Tensor]
BLOCK = 512  # rows of a product with a symmetric result that are computed at once


class Products(NamedTuple):
    """The matrix products of the iteration, as the functions below define them."""

    matmul: Product
    syrk: Product
    symmetric_matmul: Product


def matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b + beta c for matrices, summed in fp32 or wider and rounded once to their dtype."""
    if a.dtype == torch.float16 and a.device.type == "cpu":  # CPUs rarely have fp16 products
        wide = None if c is None else c.float()
        return matmul(a.float(), b.float(), wide, alpha, beta).half()
    if c is None:
        return torch.addmm(a.new_zeros(1, 1), a, b, beta=0, alpha=alpha)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def syrk(a: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha a a^T + beta c [m, m] from a [m, k]: the lower triangle (also of c), mirrored."""
    return symmetric_matmul(a, a.mT, c, alpha, beta)


def symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b + beta c [m, m] where that is symmetric: the lower triangle, mirrored.

    Exactly symmetric whatever the rounding; only the lower triangle of c is read.
    """
    rows = a.shape[0]
    lower = a.new_empty(rows, rows)
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        corner = None if c is None else c[start:stop, :stop]
        lower[start:stop, :stop] = matmul(a[start:stop], b[:, :stop], corner, alpha, beta)
    return lower.tril() + lower.tril(-1).mT


def normalize(g: Tensor, eps: float, unit: float) -> tuple[Tensor, Tensor]:
    """g [m, n] over its Frobenius norm times `unit`, contiguous, in fp32 (fp64 for fp64); and
    `eps` over that norm, at most 1.

    The matrix is first scaled by a power of two that brings its largest entry into [0.5, 1): exact,
    so that neither tiny nor huge entries leave the range of the squares, and 2^k g gives the very
    bits of g. A zero matrix stays zero. A transposed g is transposed by the scaling, which writes
    a new matrix anyway.
    """
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    limit = 1000 if wide == torch.float64 else 126
    low, high = torch.aminmax(g if g.is_contiguous() else g.mT)  # in the order of memory
    largest = torch.maximum(-low, high).to(wide)
    exponent = torch.frexp(largest).exponent.clamp(-limit, limit)
    scale = torch.ldexp(torch.ones_like(largest), -exponent)
    x = torch.mul(g, scale[None, None], out=torch.empty(g.shape, dtype=wide, device=g.device))
    norm = torch.linalg.vector_norm(x)
    if eps > 0:
        norm = norm.clamp(min=eps * scale)
    norm = torch.where(norm == 0, 1.0, norm)
    return x.div_(norm * unit), eps * scale / norm


def balance(x: Tensor, gram: Tensor, least: Tensor, unlift: float) -> tuple[Tensor, Tensor]:
    """AOL: rows of x [m, n] over e_i = sqrt(sum_j |gram_ij|) and gram [m, m] over e_i e_j.

    e_i is at least `least`. `gram` is 1 / `unlift` times as large as the Gram matrix of x. A row
    whose e_i is below 2^-60 (fp64: 2^-480), so that the product of two might be out of range,
    becomes zero.
    """
    wide = gram.to(x.dtype) * unlift
    roots = wide.abs().sum(dim=1, keepdim=True).sqrt().maximum(least)
    roots[roots < 2.0 ** (-480 if x.dtype == torch.float64 else -60)] = torch.inf
    return x / roots, (wide / (roots * roots.mT)).to(gram.dtype)


@torch.no_grad()
def newton_schulz(
    g: Tensor,
    rows: Sequence[Triple],
    *,
    method: str = "standard",
    restarts: Collection[int] = (),
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 0.0,
    aol: bool = False,
    products: Products | None = None,
) -> Tensor:
    """The image of g [..., m, n] under the odd polynomials `rows`, computed in `dtype`, returned as
    g.dtype.

    One matrix at a time: a batched product may sum in another order than a single one, and a matrix
    must not change its bits with the company it comes in.
    """
    if g.numel() == 0:
        return torch.zeros_like(g)
    if g.ndim > 2:
        matrices = g.reshape(-1, *g.shape[-2:]).unbind(0)
        keys: dict[str, Any] = {"method": method, "restarts": restarts, "dtype": dtype}
        keys |= {"eps": eps, "aol": aol, "products": products}
        images = [newton_schulz(matrix, rows, **keys) for matrix in matrices]
        return torch.stack(images).reshape(g.shape)
    engine = products or Products(matmul, syrk, symmetric_matmul)
    tall = g.shape[0] > g.shape[1]
    # fp16 ends at 6e-5, and an entry is about 1 / sqrt(m n): an exact power of two brings it near 1
    shift = min(10, (g.numel().bit_length() - 1) // 2) if dtype == torch.float16 else 0
    wide, least = normalize(g.mT if tall else g, eps, 2.0**-shift)
    x = wide.to(dtype)
    # so do entries of X X^T, about 1 / m, of which AOL looks at each
    lift = 2.0**14 if aol and dtype == torch.float16 else 1.0

    def gram_of(x: Tensor, lift: float = 1.0) -> Tensor:
        alpha = lift * 4.0**-shift
        return engine.matmul(x, x.mT, alpha=alpha) if standard else engine.syrk(x, alpha=alpha)

    standard = method == "standard"
    gram = gram_of(x, lift)
    if aol:
        scaled, gram = balance(wide, gram, least, 1 / lift)
        x = scaled.to(dtype)
    if method == "gram":
        x = _gram(x, gram, rows, restarts, engine, gram_of)
    else:
        square = engine.matmul if standard else engine.symmetric_matmul
        x = _steps(x, gram, rows, engine.matmul, square, gram_of)
    x = (x.mT if tall else x).to(torch.float32 if shift else g.dtype)
    return x.mul_(2.0**-shift).to(g.dtype) if shift else x


def _steps(
    x: Tensor,
    gram: Tensor,
    rows: Sequence[Triple],
    matmul: Product,
    square: Product,
    gram_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """`gram` is gram_of(x), and `square` the product of gram matrices."""
    for step, (a, b, c) in enumerate(rows):
        if step > 0:
            gram = gram_of(x)
        if c == 0:
            x = matmul(gram, x, x, alpha=b, beta=a)
        else:
            x = matmul(square(gram, gram, gram, alpha=c, beta=b), x, x, beta=a)
    return x


def _gram(
    x: Tensor,
    r: Tensor,
    rows: Sequence[Triple],
    restarts: Collection[int],
    engine: Products,
    gram_of: Callable[[Tensor], Tensor],
) -> Tensor:
    q = None
    for step, (a, b, c) in enumerate(rows):
        if step in restarts and q is not None:
            x = engine.matmul(q, x)
            r, q = gram_of(x), None
        z = b * r if c == 0 else engine.symmetric_matmul(r, r, r, alpha=c, beta=b)
        if q is None:
            q = z.clone()
            q.diagonal().add_(a)
        else:
            q = engine.symmetric_matmul(q, z, q, beta=a)
        if step + 1 < len(rows) and step + 1 not in restarts:
            rz = engine.symmetric_matmul(r, z, r, beta=a)
            r = engine.symmetric_matmul(z, rz, rz, beta=a)
    assert q is not None  # there is at least one row
    return engine.matmul(q, x)
