# SPDX-License-Identifier: MIT
"""Newton-Schulz orthogonalisation of matrices: the heart of Muon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import AnyMethod
from kimi_ops.optim import engine
from kimi_ops.optim.ns_schedule import (
    Coefficients,
    Triple,
    checked_restarts,
    has_aol,
    schedule,
)

__all__ = ["newton_schulz", "schedule", "symmetric_matmul", "syrk"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def newton_schulz(
    g: Tensor,
    *,
    steps: int = ...,
    coefficients: Coefficients = ...,
    method: AnyMethod = ...,
    dtype: torch.dtype | None = ...,
    restarts: Literal["auto"] | Sequence[int] = ...,
    eps: float = ...,
) -> Tensor: ...
@overload
def newton_schulz(
    g: Sequence[Tensor],
    *,
    steps: int = ...,
    coefficients: Coefficients = ...,
    method: AnyMethod = ...,
    dtype: torch.dtype | None = ...,
    restarts: Literal["auto"] | Sequence[int] = ...,
    eps: float = ...,
) -> list[Tensor]: ...
@torch.no_grad()
def newton_schulz(
    g: Tensor | Sequence[Tensor],
    *,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    method: AnyMethod = "auto",
    dtype: torch.dtype | None = None,
    restarts: Literal["auto"] | Sequence[int] = "auto",
    eps: float = 0.0,
) -> Tensor | list[Tensor]:
    r"""Drive the singular values of every matrix in `g` towards 1 with an odd polynomial iteration.

    With :math:`X_0 = G / \lVert G \rVert_F` each step computes :math:`A = X X^T` and
    :math:`X \leftarrow a X + (b A + c A^2) X`, so :math:`G = U S V^T` becomes :math:`U\, p(S)\,
    V^T` where `p` composes :math:`a\sigma + b\sigma^3 + c\sigma^5`. The quintic does not converge
    to 1: it lands in about [0.68, 1.21]. Not differentiable.

    ``coefficients="aol"`` first divides each row of X (of a tall matrix: each column) by the root
    of its sum of :math:`|X X^T|`, as Turbo-Muon does: 4 steps come as near to orthogonal as 5 of
    ``"you"`` where no direction dominates. The image is near the polar factor of the scaled matrix,
    whose singular vectors are not quite those of G.

    Parameters
    ----------
    g : Tensor [..., m, n] or sequence of such tensors
        Floating point; leading dimensions are a batch of independent matrices. Not modified.
    steps : int
        Number of iterations.
    coefficients : str, triple or list of triples
        See :func:`kimi_ops.optim.ns_schedule.schedule`.
    method : str
        ``"standard"`` (the iteration above); ``"symmetric"``, the same with the products whose
        result is symmetric computed by half; ``"gram"``, which iterates on the small [m, m]
        matrices and touches X only at restarts and at the end. ``"auto"`` is the fastest of them
        for the shape, the dtype and the engine at hand, never gram in bf16.
    dtype : torch.dtype, optional
        Arithmetic of the products, which are summed in fp32 or wider. None is bf16, as in
        ``torch.optim.Muon``; for ``"gram"``, which bf16 is too coarse for, fp32 on a CPU and fp16
        elsewhere. The norm is always taken in fp32 or wider.
    restarts : str or sequence of int
        Steps before which the Gram form multiplies out X and starts anew; ``"auto"`` takes those of
        :func:`kimi_ops.tune_ns_restarts`, as few as keep it stable. The other methods
        have none.
    eps : float
        Lower bound of the norm: a matrix with a smaller one is not brought to unit length. 0 guards
        only exact zeros. With ``"aol"`` the bound is that of what each row is divided by.

    Returns
    -------
    Tensor [..., m, n], or a list of them for a sequence
        In the dtype of its input. Zero matrices give zero; ``2**k * g`` gives the bits of `g` (with
        ``eps=0``); a matrix gives the same bits alone, in a batch, in a list, with any strides and,
        unless it is square, transposed (of a square one X X^T and X^T X are other sums, and
        ``"aol"`` scales its rows).

    Raises
    ------
    TypeError
        Not a dense real floating-point tensor, or `dtype` is not a floating type.
    ValueError
        Fewer than two dimensions, tensors on several devices, an unknown option, restarts that are
        not ascending steps or that the method does not have.

    Examples
    --------
    >>> import torch
    >>> g = torch.diag(torch.tensor([3.0, 4.0]))
    >>> o = newton_schulz(g, coefficients="deepseek_v4", steps=10, dtype=torch.float32)
    >>> o.round(decimals=2)
    tensor([[1., 0.],
            [0., 1.]])

    Notes
    -----
    K. Jordan et al., *Muon* (2024); Liu et al., *Muon is Scalable for LLM Training*, arXiv
    2502.16982; the Gram form: Dao-AILab, *Gram Newton-Schulz* (2026); AOL: Boissin et al.,
    *Turbo-Muon*, arXiv 2512.04632.
    """
    tensors = [g] if isinstance(g, Tensor) else list(g)
    for index, tensor in enumerate(tensors):
        _check_matrices("newton_schulz", "g" if tensor is g else f"g[{index}]", tensor)
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"newton_schulz: g[{index}]: expected the first one's device {tensors[0].device}, "
                f"got {tensor.device}; call once for each device"
            )
    rows, restarts = check_options(
        steps=steps,
        coefficients=coefficients,
        method=method,
        dtype=dtype,
        restarts=restarts,
        eps=eps,
    )
    images: list[Tensor | None] = [None] * len(tensors)
    for key, members in _by_road(tensors, method, dtype).items():
        road, arithmetic = key
        matrices = [x for i in members for x in as_matrices(tensors[i])]
        done = engine.orthogonalize(
            matrices,
            rows,
            method=road,
            restarts=restarts if road == "gram" else (),
            dtype=arithmetic,
            eps=float(eps),
            aol=has_aol(coefficients),
        )
        for i in members:
            shape, count = tensors[i].shape, tensors[i].shape[:-2].numel()
            mine, done = done[:count], done[count:]
            if tensors[i].ndim == 2:
                images[i] = mine[0]
            else:
                images[i] = torch.stack(mine).view(shape) if mine else torch.zeros_like(tensors[i])
    finished = [image for image in images if image is not None]
    return finished[0] if isinstance(g, Tensor) else finished


def _by_road(
    tensors: Sequence[Tensor], method: str, dtype: torch.dtype | None
) -> dict[tuple[str, torch.dtype], list[int]]:
    """Which tensors go through which method in which dtype, ``auto`` and None decided."""
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.dtype), []).append(index)
    roads: dict[tuple[str, torch.dtype], list[int]] = {}
    for members in alike.values():
        tensor, arithmetic, road = tensors[members[0]], dtype, method
        if arithmetic is None:
            on_cpu = tensor.device.type == "cpu"
            fine = torch.float32 if on_cpu else torch.float16
            arithmetic = fine if road == "gram" else torch.bfloat16
        if road == "auto":
            road = engine.cheapest(tensor, arithmetic)
        roads.setdefault((road, arithmetic), []).extend(members)
    return roads


def as_matrices(x: Tensor) -> list[Tensor]:
    """The matrices of x [..., m, n] as views, whatever its strides."""
    return [x] if x.ndim == 2 else [matrix for part in x.unbind(0) for matrix in as_matrices(part)]


def check_options(
    *,
    steps: int,
    coefficients: Coefficients,
    method: AnyMethod,
    dtype: torch.dtype | None,
    restarts: Literal["auto"] | Sequence[int],
    eps: float,
) -> tuple[tuple[Triple, ...], tuple[int, ...]]:
    """The triples and the restarts that the options of :func:`newton_schulz` stand for; raises for
    options that no engine serves."""
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(
            f"newton_schulz: dtype: expected fp16, bf16, fp32, fp64 or None, got {dtype}; "
            "choose one"
        )
    _check.choice("newton_schulz", "method", method, get_args(AnyMethod))
    if not _check.number("newton_schulz", "eps", eps) >= 0:
        raise ValueError(
            f"newton_schulz: eps: expected a number >= 0, got {eps}; 0 guards exact zeros"
        )
    rows = schedule(coefficients, steps)
    return rows, checked_restarts(rows, method, restarts)


def syrk(a: Tensor, *, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    r"""The symmetric product :math:`\alpha A A^T + \beta C`, bitwise symmetric.

    Only the lower triangle is computed; the upper one is its mirror image.

    Parameters
    ----------
    a : Tensor [..., m, k]
        Floating point; leading dimensions are a batch.
    c : Tensor [..., m, m], optional
        Symmetric, of `a`'s dtype; only its lower triangle is read.
    alpha, beta : float

    Returns
    -------
    Tensor [..., m, m]
        In `a`'s dtype, summed in fp32 or wider and rounded once. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes, shapes or devices; `beta` without `c`.

    Examples
    --------
    >>> import torch
    >>> syrk(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[ 5., 11.],
            [11., 25.]])
    """
    _check_matrices("syrk", "a", a)
    shape = (*a.shape[:-1], a.shape[-2])
    _check_operand("syrk", "c", c, a, shape)
    return _batched("syrk", engine.syrk, (a,), c, alpha, beta, shape)


def symmetric_matmul(
    a: Tensor, b: Tensor, *, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    r"""The product :math:`\alpha A B + \beta C` of symmetric matrices that commute.

    Such a product is symmetric in exact arithmetic. Only its lower triangle is computed and
    mirrored, so the result is symmetric bit for bit; that `a` and `b` commute is not checked.

    Parameters
    ----------
    a, b : Tensor [..., m, m]
        Symmetric, same floating dtype; leading dimensions are a batch.
    c : Tensor [..., m, m], optional
        Symmetric; only its lower triangle is read.
    alpha, beta : float

    Returns
    -------
    Tensor [..., m, m]
        In `a`'s dtype, summed in fp32 or wider and rounded once. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes, shapes or devices; `beta` without `c`.

    Examples
    --------
    >>> import torch
    >>> a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> symmetric_matmul(a, a, c=a, beta=-4.0)
    tensor([[-3.,  0.],
            [ 0., -3.]])
    """
    _check_matrices("symmetric_matmul", "a", a)
    if a.shape[-1] != a.shape[-2]:
        raise ValueError(
            f"symmetric_matmul: a: expected [..., m, m], got shape {tuple(a.shape)}; give a square "
            "matrix"
        )
    for name, operand in (("b", b), ("c", c)):
        _check_operand("symmetric_matmul", name, operand, a, tuple(a.shape))
    return _batched(
        "symmetric_matmul", engine.symmetric_matmul, (a, b), c, alpha, beta, tuple(a.shape)
    )


def _check_matrices(op: str, name: str, value: Tensor) -> None:
    _check.tensor(op, name, value)
    if value.dtype not in _FLOATS or value.layout != torch.strided:
        raise TypeError(
            f"{op}: {name}: expected a dense floating-point tensor, got {value.dtype}, "
            f"{value.layout}; convert it"
        )
    if value.ndim < 2:
        raise ValueError(
            f"{op}: {name}: expected [..., m, n], got shape {tuple(value.shape)}; give it as a "
            "matrix"
        )


def _check_operand(
    op: str, name: str, value: Tensor | None, like: Tensor, shape: tuple[int, ...]
) -> None:
    if value is None:
        return
    _check.tensor(op, name, value)
    _check.dtype(op, name, value, [like.dtype])
    _check.shape(op, name, value, shape)
    _check.same_device(op, name, value, "a", like)


@torch.no_grad()
def _batched(
    op: str,
    product: Callable[..., Tensor],
    operands: tuple[Tensor, ...],
    c: Tensor | None,
    alpha: float,
    beta: float,
    shape: tuple[int, ...],
) -> Tensor:
    """`product` matrix by matrix: a result never depends on the company."""
    _check.number(op, "alpha", alpha)
    if _check.number(op, "beta", beta) != 0 and c is None:
        raise ValueError(f"{op}: beta: {beta} needs a matrix c, got none; give c or leave beta 0")
    given = operands if c is None else (*operands, c)
    stacks = [as_matrices(operand) for operand in given]
    images = []
    for matrices in zip(*stacks, strict=True):
        *factors, addend = (*matrices, None) if c is None else matrices
        images.append(product(*factors, addend, alpha, beta))
    return torch.stack(images).view(shape) if images else operands[0].new_zeros(shape)
