# SPDX-License-Identifier: MIT
"""Matrix products of every expert's group of rows, and their weight gradients."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops._autocast import autocast
from kimi_ops._forms import check_accumulate, check_form
from kimi_ops.moe.quantized import Fp8BlockWeight, Fp8Rows, QuantizedWeight
from kimi_ops.moe.quantized_gemm import fp8_gemm, quantized_gemm
from kimi_ops.operators import grouped_gemm as operators

__all__ = ["grouped_gemm", "grouped_gemm_wgrad"]


def grouped_gemm(
    a: Tensor | Fp8Rows,
    b: Tensor | QuantizedWeight,
    offsets: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Multiply each expert's rows by its matrix: ``c[r] = a[r] @ b[e(r)] + bias[e(r)]``.

    Expert e owns the rows ``offsets[e - 1] <= r < offsets[e]``. Rows of no expert, as those from
    ``offsets[-1]`` on, are zero in the result and never read. R, K, N and the groups need no
    alignment. The other forms of `torch.nn.functional.grouped_mm`, and padded groups:

    ============== ============ ============= ==========================================
    a              b            result        groups
    ============== ============ ============= ==========================================
    [R, K]         [E, K, N]    [R, N]        of rows, by offsets (and starts)
    [E, M, K]      [E, K, N]    [E, M, N]     a matrix each, or its first counts[e] rows
    [E, M, K]      [K, N]       [M, N]        of columns of b, by offsets
    [M, K]         [K, N]       [E, M, N]     of K, by offsets: `grouped_gemm_wgrad`
    ============== ============ ============= ==========================================

    Parameters
    ----------
    a : Tensor [R, K] bfloat16, float16, float32 or float64
        Or `Fp8Rows`, with a `Fp8BlockWeight` only and without gradients: products of e4m3 values,
        summed and scaled by blocks of 128.
    b : Tensor [E, K, N], the dtype of a, any stride order
        For weights stored as `torch.nn.Linear` does, [E, N, K], pass ``w.transpose(1, 2)``. A
        `Fp8BlockWeight` or `Int4GroupWeight` of shape [E, N, K] stands for its transpose; it is
        dequantised to the dtype of a (CPU only, read only).
    offsets : Tensor [E] int32 or int64
        Inclusive end rows, not decreasing, as `PermutePlan.offsets`. E may be 0. None where a and b
        have a matrix for each expert.
    starts : Tensor [E], the dtype of offsets, optional
        First rows, where groups leave gaps: ``offsets[e - 1] <= starts[e] <= offsets[e]``. Gaps
        cost nothing but their zeros. With a [R, K] and b [E, K, N] of floats only.
    counts : Tensor [E] int32 or int64, optional
        With a [E, M, K] and b [E, K, N]: only the first ``counts[e] <= M`` rows of a[e] are read,
        the others give zeros (the masked layout of decoding). None: all M.
    bias : Tensor [E, N], the dtype of a, optional
        The dtype of the result beside FP8 rows. Not with b [K, N].
    out : Tensor, the shape of the result, optional
        Receives it; not together with gradients.
    out_dtype : dtype of a or torch.float32, optional
        float32 keeps the accumulator of half-precision products unrounded. FP8 rows give bfloat16
        unless this says float16 or float32.
    accumulate : bool
        Add to `out` instead of replacing it: in fp32, rounded once. Rows of no expert keep what
        they have. Not with FP8 rows or quantised weights.

    Returns
    -------
    Tensor [R, N]

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device; options that do not go together. Bad offsets, starts or
        counts: on the CPU always, on CUDA when the environment has ``KIMI_OPS_CHECK=1`` (the check
        reads them back).

    Notes
    -----
    Differentiable in a, bias and a Tensor b; an expert without rows has a zero gradient. Under
    `torch.autocast` the operands are cast as those of `torch.mm` are. A superset of
    `torch.nn.functional.grouped_mm`. Cost: 2 K N operations a row of a group.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import grouped_gemm
    >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> b = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    >>> grouped_gemm(a, b, torch.tensor([1, 2], dtype=torch.int32)).tolist()
    [[1.0, 2.0], [6.0, 8.0], [0.0, 0.0]]
    >>> counts = torch.tensor([2, 0], dtype=torch.int32)
    >>> grouped_gemm(torch.stack([a, a]), b, counts=counts).sum(-1).tolist()
    [[3.0, 7.0, 0.0], [0.0, 0.0, 0.0]]
    """
    plain = isinstance(a, Tensor) and isinstance(b, Tensor)
    if accumulate:
        check_accumulate(out, plain)
    form = (a.dim(), b.dim()) if plain else (2, 3)  # type: ignore[union-attr]
    if form != (2, 3) or offsets is None or starts is not None or counts is not None:
        check_form(form, plain, a, b, offsets, starts, counts, bias)
    if form != (2, 3):
        given: dict[str, Any] = {"out": out, "out_dtype": out_dtype, "accumulate": accumulate}
        return _other_form(form, a, b, offsets, counts, bias, given)
    assert offsets is not None
    if isinstance(a, Fp8Rows):
        return _fp8(a, b, offsets, bias, out, out_dtype)
    _check.tensor("grouped_gemm", "a", a)
    x, b, bias = autocast(a, b, bias)
    dtype = _result_dtype(x.dtype, out, out_dtype)
    if isinstance(b, QuantizedWeight):
        if out is not None:
            _refuse_gradients("grouped_gemm", x, bias, out)
        return quantized_gemm(x, b, offsets, bias, out, dtype)
    if out is None:
        return operators.grouped_gemm(x, b, offsets, bias, dtype, starts)
    _refuse_gradients("grouped_gemm", x, b, bias, out)
    operators.grouped_gemm_out(x, b, offsets, bias, out, accumulate, starts)
    return out


def grouped_gemm_wgrad(
    a: Tensor,
    dc: Tensor,
    offsets: Tensor,
    *,
    starts: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Gradient of `grouped_gemm` in b: ``dw[e] = a[rows of e]^T @ dc[rows of e]``.

    Parameters
    ----------
    a : Tensor [R, K]
    dc : Tensor [R, N], the dtype of a
    offsets : Tensor [E] int32 or int64
    starts : Tensor [E], the dtype of offsets, optional
        Both as in `grouped_gemm`.
    out : Tensor [E, K, N], the dtype of a or float32, any stride order, optional
        Receives the gradient; float32 is the main gradient of mixed-precision training.
    accumulate : bool
        Add to `out` instead of replacing it. An expert without rows then keeps its values;
        otherwise it becomes zero.

    Returns
    -------
    Tensor [E, K, N]
        `out` where given. Otherwise differentiable in a and dc: the product of two matrices of rows
        along the rows of each group, in the dtype of a.

    Raises
    ------
    TypeError, ValueError
        As `grouped_gemm`; also accumulate without out.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import grouped_gemm_wgrad
    >>> a, dc = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    >>> grouped_gemm_wgrad(a, dc, torch.tensor([2, 2], dtype=torch.int32)).flatten().tolist()
    [11.0, 0.0]
    """
    if out is not None:
        _refuse_gradients("grouped_gemm_wgrad", a, dc, out)
        with torch.no_grad():
            operators.grouped_gemm_wgrad_out(a, dc, offsets, out, accumulate, starts)
        return out
    if accumulate:
        raise ValueError(
            "grouped_gemm_wgrad: accumulate: expected out beside it, got none; pass the tensor to "
            "add to"
        )
    _check.tensor("grouped_gemm_wgrad", "a", a)
    return operators.grouped_gemm_wgrad(a, dc, offsets, a.dtype, starts)


def _other_form(
    form: tuple[int, int], a: Any, b: Any, offsets: Tensor | None, counts: Tensor | None,
    bias: Tensor | None, given: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Of the same products: with rows and columns exchanged, by K, or of groups that begin every M
    rows of [E * M, K]."""
    out = given["out"]
    if form == (3, 2):
        given["out"] = None if out is None else out.t()
        c = grouped_gemm(b.t(), a.transpose(1, 2), offsets, **given)
        return c.t() if out is None else out
    if form == (2, 2):
        assert offsets is not None
        if out is not None:
            return grouped_gemm_wgrad(a.t(), b, offsets, out=out, accumulate=given["accumulate"])
        a, b = autocast(a, b)
        dtype = _result_dtype(a.dtype, None, given["out_dtype"])
        return operators.grouped_gemm_wgrad(a.t(), b, offsets, dtype, None)
    experts, rows, depth = a.shape
    if len(b) != experts:
        raise ValueError(
            f"grouped_gemm: b: expected {experts} matrices as a, got {len(b)}; pass one for each"
        )
    sizes = experts, rows, b.shape[2]
    if out is not None:
        if tuple(out.shape) != sizes or not out.is_contiguous():
            raise ValueError(
                f"grouped_gemm: out: expected a contiguous {list(sizes)}, got {list(out.shape)} of "
                f"strides {out.stride()}; allocate it with that shape"
            )
        given["out"] = out.view(experts * rows, sizes[2])
    starts = torch.arange(experts, dtype=torch.int32, device=a.device) * rows
    if counts is None:
        ends, firsts = starts + rows, None
    else:
        ends, firsts = starts + _counts(counts, experts), starts
    c = grouped_gemm(a.reshape(-1, depth), b, ends, starts=firsts, bias=bias, **given)
    return c.view(sizes) if out is None else out


def _counts(counts: Tensor, experts: int) -> Tensor:
    _check.tensor("grouped_gemm", "counts", counts)
    _check.dtype("grouped_gemm", "counts", counts, (torch.int32, torch.int64))
    _check.shape("grouped_gemm", "counts", counts, (experts,))
    # what fits no int32 stays wrong
    return counts if counts.dtype == torch.int32 else counts.clamp(-1, _MOST).int()


_MOST = torch.iinfo(torch.int32).max


def _fp8(
    a: Fp8Rows,
    b: Tensor | QuantizedWeight,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    if not isinstance(b, Fp8BlockWeight):
        raise TypeError(
            f"grouped_gemm: b: expected a Fp8BlockWeight beside FP8 rows, got {type(b).__name__}; "
            "quantize it, or pass a.dequantize(dtype)"
        )
    dtype = _result_dtype(torch.bfloat16, out, out_dtype)
    return fp8_gemm(a, b, offsets, bias, out, dtype)


def _result_dtype(
    default: torch.dtype, out: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    if out is None:
        return out_dtype or default
    if out_dtype not in (None, out.dtype):
        raise TypeError(
            f"grouped_gemm: out: expected {out_dtype}, got {out.dtype}; leave out_dtype away"
        )
    return out.dtype


def _refuse_gradients(op: str, *inputs: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise ValueError(
            f"{op}: out: no gradient can flow through a given output, but it or an input requires "
            "one; leave out away or call under torch.no_grad()"
        )
