# SPDX-License-Identifier: MIT
"""Matrix products of every expert's group of rows, and their weight gradients."""

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops._autocast import autocast
from kimi_ops.moe.quantized import Fp8BlockWeight, Fp8Rows, QuantizedWeight
from kimi_ops.moe.quantized_gemm import fp8_gemm, quantized_gemm
from kimi_ops.operators import grouped_gemm as operators

__all__ = ["grouped_gemm", "grouped_gemm_wgrad"]


def grouped_gemm(
    a: Tensor | Fp8Rows,
    b: Tensor | QuantizedWeight,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply each expert's rows by its matrix: ``c[r] = a[r] @ b[e(r)] + bias[e(r)]``.

    Expert e owns the rows ``offsets[e - 1] <= r < offsets[e]``. Rows from ``offsets[-1]`` on are
    zero in the result and never read. R, K, N and the groups need no alignment.

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
        Inclusive end rows, not decreasing, as `PermutePlan.offsets`.
    bias : Tensor [E, N], the dtype of a, optional
        The dtype of the result beside FP8 rows.
    out : Tensor [R, N], optional
        Receives the result; not together with gradients.
    out_dtype : dtype of a or torch.float32, optional
        float32 keeps the accumulator of half-precision products unrounded. FP8 rows give bfloat16
        unless this says float16 or float32.

    Returns
    -------
    Tensor [R, N]

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device. Bad offsets: on the CPU always, on CUDA when the environment
        has ``KIMI_OPS_CHECK=1`` (the check reads them back).

    Notes
    -----
    Differentiable in a, bias and a Tensor b; an expert without rows has a zero gradient. Under
    `torch.autocast` the operands are cast as those of `torch.mm` are. A superset of
    `torch.nn.functional.grouped_mm`. Cost: 2 R K N operations.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import grouped_gemm
    >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> b = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    >>> grouped_gemm(a, b, torch.tensor([1, 2], dtype=torch.int32)).tolist()
    [[1.0, 2.0], [6.0, 8.0], [0.0, 0.0]]
    """
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
        return operators.grouped_gemm(x, b, offsets, bias, dtype)
    _refuse_gradients("grouped_gemm", x, b, bias, out)
    operators.grouped_gemm_out(x, b, offsets, bias, out)
    return out


def grouped_gemm_wgrad(
    a: Tensor,
    dc: Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Gradient of `grouped_gemm` in b: ``dw[e] = a[rows of e]^T @ dc[rows of e]``.

    Parameters
    ----------
    a : Tensor [R, K]
    dc : Tensor [R, N], the dtype of a
    offsets : Tensor [E] int32 or int64
        As in `grouped_gemm`.
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
            operators.grouped_gemm_wgrad_out(a, dc, offsets, out, accumulate)
        return out
    if accumulate:
        raise ValueError(
            "grouped_gemm_wgrad: accumulate: expected out beside it, got none; pass the tensor to "
            "add to"
        )
    _check.tensor("grouped_gemm_wgrad", "a", a)
    return operators.grouped_gemm_wgrad(a, dc, offsets, a.dtype)


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
