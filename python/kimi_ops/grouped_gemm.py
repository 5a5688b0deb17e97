# SPDX-License-Identifier: MIT
"""Matrix products of every expert's group of rows, and their weight gradients."""

import os

import torch
from torch import Tensor

from kimi_ops.quantized import QuantizedWeight, quantized_gemm
from kimi_ops.reference import grouped_gemm as reference

__all__ = ["grouped_gemm", "grouped_gemm_wgrad"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def grouped_gemm(
    a: Tensor,
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
    b : Tensor [E, K, N], the dtype of a, any stride order
        For weights stored as `torch.nn.Linear` does, [E, N, K], pass ``w.transpose(1, 2)``. A
        `Fp8BlockWeight` or `Int4GroupWeight` of shape [E, N, K] stands for its transpose; it is
        dequantised to the dtype of a (CPU only, read only).
    offsets : Tensor [E] int32 or int64
        Inclusive end rows, not decreasing, as `PermutePlan.offsets`.
    bias : Tensor [E, N], the dtype of a, optional
    out : Tensor [R, N], optional
        Receives the result; not together with gradients.
    out_dtype : dtype of a or torch.float32, optional
        float32 keeps the accumulator of half-precision products unrounded.

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
    >>> from kimi_ops.grouped_gemm import grouped_gemm
    >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> b = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    >>> grouped_gemm(a, b, torch.tensor([1, 2], dtype=torch.int32)).tolist()
    [[1.0, 2.0], [6.0, 8.0], [0.0, 0.0]]
    """
    op = "grouped_gemm"
    a, bias = autocast(a), None if bias is None else autocast(bias)
    if isinstance(b, QuantizedWeight):
        experts, n = _check_quantized(op, a, b)
    else:
        b = autocast(b)
        _check_operands(op, a, "a", b, "b", a.dim() == 2 and b.dim() == 3, "[R, K] and [E, K, N]")
        if b.shape[1] != a.shape[1]:
            raise ValueError(
                f"{op}: b: expected shape [E, K={a.shape[1]}, N], got {list(b.shape)}; for weights "
                "[E, N, K] pass w.transpose(1, 2)"
            )
        experts, n = b.shape[0], b.shape[2]
    offsets = _check_offsets(op, offsets, experts, a)
    dtype = _result_dtype(op, a, out, out_dtype)
    if bias is not None:
        if bias.dtype != a.dtype:
            raise TypeError(f"{op}: bias: expected {a.dtype}, got {bias.dtype}; convert it")
        if bias.shape != (experts, n):
            raise ValueError(
                f"{op}: bias: expected shape {[experts, n]}, got {list(bias.shape)}; pass one row "
                "for each expert"
            )
    if out is not None:
        _check_out(op, out, [a.shape[0], n], a)
        inputs = [t for t in (a, b, bias) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            raise ValueError(
                f"{op}: out: no gradient can flow through a given output, but an input requires "
                "one; leave out away or call under torch.no_grad()"
            )
    if isinstance(b, QuantizedWeight):
        return quantized_gemm(a, b, offsets, bias, out, dtype)
    return reference.grouped_gemm(a, b, offsets, bias, out, dtype)


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
        `out` where given. Not differentiable itself.

    Raises
    ------
    TypeError, ValueError
        As `grouped_gemm`; also accumulate without out.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.grouped_gemm import grouped_gemm_wgrad
    >>> a, dc = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    >>> grouped_gemm_wgrad(a, dc, torch.tensor([2, 2], dtype=torch.int32)).flatten().tolist()
    [11.0, 0.0]
    """
    op = "grouped_gemm_wgrad"
    _check_operands(op, a, "a", dc, "dc", a.dim() == 2 and dc.dim() == 2, "[R, K] and [R, N]")
    if a.shape[0] != dc.shape[0]:
        raise ValueError(
            f"{op}: dc: expected {a.shape[0]} rows, got {dc.shape[0]}; pass the gradient of a's "
            "rows"
        )
    offsets = _check_offsets(op, offsets, None, a)
    if out is None:
        if accumulate:
            raise ValueError(
                f"{op}: accumulate: expected out beside it, got none; pass the tensor to add to"
            )
    else:
        _result_dtype(op, a, out, None)
        _check_out(op, out, [offsets.numel(), a.shape[1], dc.shape[1]], a)
    with torch.no_grad():
        return reference.grouped_gemm_wgrad(a, dc, offsets, out, accumulate)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of an enclosing `torch.autocast`, which leaves float64 alone; else x."""
    kind = x.device.type
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return x
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _check_operands(
    op: str, a: Tensor, a_name: str, b: Tensor, b_name: str, shapes_fit: bool, shapes: str
) -> None:
    if a.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {a_name}: expected bfloat16, float16, float32 or float64, got {a.dtype}; "
            "convert it"
        )
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: {b_name}: expected {a.dtype}, got {b.dtype}; convert one of them")
    if not shapes_fit:
        raise ValueError(
            f"{op}: {a_name}, {b_name}: expected shapes {shapes}, got {list(a.shape)} and "
            f"{list(b.shape)}; reshape them"
        )
    if a.device != b.device:
        raise ValueError(f"{op}: {b_name}: expected device {a.device}, got {b.device}; move it")
    if a.dtype == torch.float64 and a.device.type != "cpu":
        raise TypeError(f"{op}: {a_name}: float64 is served on the CPU only; use float32 here")


def _check_quantized(op: str, a: Tensor, b: QuantizedWeight) -> tuple[int, int]:
    """E and N of a quantised weight that fits a."""
    experts, n, k = b.shape
    if a.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: a: expected bfloat16, float16, float32 or float64, got {a.dtype}; convert it"
        )
    if a.dim() != 2 or a.shape[1] != k:
        raise ValueError(
            f"{op}: a: expected shape [R, K={k}] beside a quantised weight {list(b.shape)} "
            f"[E, N, K], got {list(a.shape)}; reshape it"
        )
    if a.device != b.device:
        raise ValueError(f"{op}: b: expected device {a.device}, got {b.device}; move it")
    if a.device.type != "cpu":
        raise ValueError(
            f"{op}: b: expected a Tensor on {a.device}, got {type(b).__name__}, which is served on "
            "the CPU only; pass b.dequantize(a.dtype).transpose(1, 2)"
        )
    return experts, n


def _check_offsets(op: str, offsets: Tensor, experts: int | None, a: Tensor) -> Tensor:
    """The offsets as int32."""
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: offsets: expected int32 or int64, got {offsets.dtype}; use offsets.int()"
        )
    if offsets.dim() != 1 or offsets.numel() < 1 or experts not in (None, offsets.numel()):
        raise ValueError(
            f"{op}: offsets: expected shape [E={experts or '>= 1'}], got {list(offsets.shape)}; "
            "pass one end row for each expert"
        )
    if offsets.device != a.device:
        raise ValueError(
            f"{op}: offsets: expected device {a.device}, got {offsets.device}; move them there"
        )
    if offsets.device.type == "meta":
        return offsets.int()
    if offsets.device.type == "cpu" or os.environ.get("KIMI_OPS_CHECK") == "1":
        ends = [0, *offsets.tolist(), a.shape[0]]
        if any(end < start for start, end in zip(ends[:-1], ends[1:], strict=True)):
            raise ValueError(
                f"{op}: offsets: expected 0 <= offsets[0] <= ... <= offsets[-1] <= R = "
                f"{a.shape[0]}, got {_short(ends[1:-1])}; pass the cumulative sum of the group "
                "sizes"
            )
    return offsets.int()


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


def _result_dtype(
    op: str, a: Tensor, out: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    dtype = out_dtype or (a.dtype if out is None else out.dtype)
    if out is not None and out.dtype != dtype:
        raise TypeError(f"{op}: out: expected {dtype}, got {out.dtype}; leave out_dtype away")
    if dtype not in (a.dtype, torch.float32) or (a.dtype == torch.float64 != dtype):
        name = "out_dtype" if out is None else "out"
        allowed = "float64" if a.dtype == torch.float64 else f"{a.dtype} or torch.float32"
        raise TypeError(f"{op}: {name}: expected {allowed}, got {dtype}; choose one of these")
    return dtype


def _check_out(op: str, out: Tensor, shape: list[int], a: Tensor) -> None:
    if list(out.shape) != shape or out.device != a.device:
        raise ValueError(
            f"{op}: out: expected shape {shape} on {a.device}, got {list(out.shape)} on "
            f"{out.device}; allocate it with that shape"
        )
