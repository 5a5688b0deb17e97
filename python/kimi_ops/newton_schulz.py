# SPDX-License-Identifier: MIT
"""Newton-Schulz orthogonalisation of matrices: the heart of Muon."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops.reference.newton_schulz import FIXED_SCHEDULES, SCHEDULES
from kimi_ops.reference.newton_schulz import newton_schulz as reference_newton_schulz

Triple = tuple[float, float, float]
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SERVED_METHODS = ("auto", "standard")


def schedule(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The `steps` triples (a, b, c) that `coefficients` stands for.

    Parameters
    ----------
    coefficients : str, triple, or sequence of triples
        ``"quintic"`` and ``"polar_express"`` take any number of steps (their last row repeats);
        ``"you"``, ``"cans"``, ``"cubic"`` (5 rows) and ``"deepseek_v4"`` (10 rows) only their own;
        one triple repeats; a list has one per step.
    steps : int
        Number of iterations, 1 to 99.

    Raises
    ------
    ValueError
        Unknown name, wrong number of steps, or something that is not made of triples.

    Examples
    --------
    >>> schedule("quintic", 2)
    ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(
            f"newton_schulz: steps: expected an int, got {type(steps).__name__}; convert it"
        )
    if not 1 <= steps < 100:
        raise ValueError(f"newton_schulz: steps: expected 1 to 99, got {steps}; 5 is usual")
    if isinstance(coefficients, str):
        if coefficients not in SCHEDULES:
            raise ValueError(
                f"newton_schulz: coefficients: expected one of {sorted(SCHEDULES)}, a triple or "
                f"a list of "
                f"triples, got {coefficients!r}; choose one"
            )
        rows = SCHEDULES[coefficients]
        if coefficients in FIXED_SCHEDULES and len(rows) != steps:
            raise ValueError(
                f"newton_schulz: steps: the schedule {coefficients!r} has {len(rows)} steps, "
                f"got {steps}; "
                f"pass steps={len(rows)}"
            )
        return (rows + rows[-1:] * steps)[:steps]
    listed = list(coefficients)
    if len(listed) == 3 and all(isinstance(value, (int, float)) for value in listed):
        listed = [listed] * steps
    triples = []
    for row in listed:
        values = tuple(float(v) for v in row) if isinstance(row, Sequence) else ()
        if len(values) != 3:
            raise ValueError(
                f"newton_schulz: coefficients: expected a triple or a list of triples, got "
                f"{coefficients!r}; give (a, b, c) for each step"
            )
        triples.append((values[0], values[1], values[2]))
    if len(triples) != steps:
        raise ValueError(
            f"newton_schulz: steps: {len(triples)} triples were given, got steps={steps}; pass "
            f"steps={len(triples)}"
        )
    return tuple(triples)


def newton_schulz(
    g: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    method: str = "auto",
    dtype: torch.dtype | None = None,
    restarts: str | Sequence[int] = "auto",
    eps: float = 0.0,
) -> Tensor:
    r"""Drive the singular values of every matrix in `g` towards 1 with an odd polynomial iteration.

    With :math:`X_0 = G / \lVert G \rVert_F` each step computes :math:`A = X X^T` and
    :math:`X \leftarrow a X + (b A + c A^2) X`, so :math:`G = U S V^T` becomes :math:`U\, p(S)\,
    V^T` where `p` composes :math:`a\sigma + b\sigma^3 + c\sigma^5`. The quintic does not converge
    to 1: it lands in about [0.68, 1.21].

    Parameters
    ----------
    g : Tensor [..., m, n]
        Floating point; leading dimensions are a batch of independent matrices. Not modified.
    steps : int
        Number of iterations.
    coefficients : str, triple or list of triples
        See :func:`schedule`.
    method : str
        ``"auto"`` or ``"standard"`` (the iteration above).
    dtype : torch.dtype, optional
        Arithmetic of the products; None is bf16, as in ``torch.optim.Muon``. The norm is always
        taken in fp32 or wider.
    restarts : str or sequence of int
        Restart steps of the Gram form; the standard form has none, so ``"auto"`` or an empty
        sequence.
    eps : float
        Lower bound of the norm: a matrix with a smaller one is not brought to unit length. 0 guards
        only exact zeros.

    Returns
    -------
    Tensor [..., m, n]
        In `g`'s dtype. Zero matrices give zero; ``2**k * g`` gives the bits of `g` (with
        ``eps=0``).

    Raises
    ------
    TypeError
        `g` is not a real floating-point tensor, or `dtype` is not a floating type.
    ValueError
        Fewer than two dimensions, or an option that no engine serves.

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
    2502.16982.
    """
    if not isinstance(g, Tensor):
        raise TypeError(f"newton_schulz: g: expected a Tensor, got {type(g).__name__}; convert it")
    if g.dtype not in _FLOATS or g.layout != torch.strided:
        raise TypeError(
            f"newton_schulz: g: expected a dense floating-point tensor, got {g.dtype}, {g.layout}; "
            "convert it"
        )
    if g.ndim < 2:
        raise ValueError(
            f"newton_schulz: g: expected [..., m, n], got shape {tuple(g.shape)}; give it as a "
            f"matrix"
        )
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(
            f"newton_schulz: dtype: expected fp16, bf16, fp32, fp64 or None, got {dtype}; "
            "choose one"
        )
    if method not in _SERVED_METHODS:
        raise ValueError(
            f"newton_schulz: method: served are {', '.join(map(repr, _SERVED_METHODS))}, got "
            f"{method!r}"
        )
    if restarts != "auto" and (isinstance(restarts, str) or len(restarts) > 0):
        raise ValueError(
            f"newton_schulz: restarts: the standard method has none, got {restarts!r}; pass "
            f"'auto' or ()"
        )
    if not eps >= 0:
        raise ValueError(
            f"newton_schulz: eps: expected a number >= 0, got {eps}; 0 guards exact zeros"
        )
    rows = schedule(coefficients, steps)
    return reference_newton_schulz(g, rows, dtype=dtype or torch.bfloat16, eps=float(eps))
