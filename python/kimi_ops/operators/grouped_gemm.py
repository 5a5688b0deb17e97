# SPDX-License-Identifier: MIT
"""The operators behind `kimi_ops.grouped_gemm`: checks, native calls, fake tensors, gradients.

Tensors of 16 or 32 bits go to the kernels, float64 to the torch twin.
"""

import os
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.operators.registry import register
from kimi_ops.operators.tensors import huge_pages, with_a_unit_stride, workspace
from kimi_ops.reference import grouped_gemm as reference

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STORAGES = {**_native.DTYPES, torch.float8_e4m3fn: 3, torch.int32: 4}  # kimi_storage by data dtype


def is_native(x: Tensor) -> bool:
    return x.dtype in _native.DTYPES


def check_offset_values(op: str, offsets: Tensor, rows: int) -> None:
    """What the kernels check themselves; on CUDA only with KIMI_OPS_CHECK=1, for it reads back."""
    if offsets.device.type != "cpu" and os.environ.get("KIMI_OPS_CHECK") != "1":
        return
    ends = [0, *offsets.tolist(), rows]
    if any(end < start for start, end in zip(ends[:-1], ends[1:], strict=True)):
        shown = ", ".join(map(str, ends[1:-1][:8])) + (", ..." if len(ends) > 10 else "")
        raise ValueError(
            f"{op}: offsets: expected 0 <= offsets[0] <= ... <= offsets[-1] <= R = {rows}, got "
            f"[{shown}]; pass the cumulative sum of the group sizes"
        )


def _check_pair(op: str, a: Tensor, b_name: str, b: Tensor, shapes_fit: bool, shapes: str) -> None:
    _check.dtype(op, "a", a, _DTYPES)
    _check.dtype(op, b_name, b, (a.dtype,))
    if not shapes_fit:
        raise ValueError(
            f"{op}: a, {b_name}: expected shapes {shapes}, got {list(a.shape)} and "
            f"{list(b.shape)}; reshape them"
        )
    _check.same_device(op, b_name, b, "a", a)
    if a.dtype == torch.float64 and a.device.type == "cuda":
        raise TypeError(f"{op}: a: expected float32 at most on CUDA, got float64; use a.float()")


def check_offsets(op: str, offsets: Tensor, experts: int | None, a: Tensor) -> None:
    _check.dtype(op, "offsets", offsets, (torch.int32,))
    if offsets.dim() != 1 or offsets.shape[0] < 1 or experts not in (None, offsets.shape[0]):
        wanted = "E >= 1" if experts is None else f"E={experts}"
        raise ValueError(
            f"{op}: offsets: expected shape [{wanted}], got {list(offsets.shape)}; pass one end "
            "row for each expert"
        )
    _check.same_device(op, "offsets", offsets, "a", a)


def check_dtype(op: str, name: str, a: Tensor, dtype: torch.dtype) -> None:
    if dtype != a.dtype and (dtype != torch.float32 or a.dtype == torch.float64):
        allowed = "float64" if a.dtype == torch.float64 else f"{a.dtype} or torch.float32"
        raise TypeError(f"{op}: {name}: expected {allowed}, got {dtype}; choose one of these")


def check_bias(op: str, a: Tensor, bias: Tensor | None, experts: int, n: int) -> None:
    if bias is None:
        return
    _check.dtype(op, "bias", bias, (a.dtype,))
    _check.shape(op, "bias", bias, (experts, n), "pass one row for each expert")
    _check.same_device(op, "bias", bias, "a", a)


def _check_gemm(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, name: str, dtype: torch.dtype
) -> None:
    op = "grouped_gemm"
    _check_pair(op, a, "b", b, a.dim() == 2 and b.dim() == 3, "[R, K] and [E, K, N]")
    if b.shape[1] != a.shape[1]:
        raise ValueError(
            f"{op}: b: expected shape [E, K={a.shape[1]}, N], got {list(b.shape)}; for weights "
            "[E, N, K] pass w.transpose(1, 2)"
        )
    check_offsets(op, offsets, b.shape[0], a)
    check_dtype(op, name, a, dtype)
    check_bias(op, a, bias, b.shape[0], b.shape[2])


# ---- grouped_gemm


def _run(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if a.is_cuda or not is_native(a):  # the kernels check offsets on the CPU themselves
        check_offset_values("grouped_gemm", offsets, a.shape[0])
    if not is_native(a):
        reference.forward(a, b, offsets, bias, out)
        return
    dense = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    a, offsets = with_a_unit_stride(a), offsets.contiguous()
    bias = None if bias is None else bias.contiguous()
    scratch = workspace("grouped_gemm", a, b.shape[0], _native.DTYPES[a.dtype])
    _native.call(
        "grouped_gemm", a, a.data_ptr(), b.data_ptr(), 0, offsets.data_ptr(),
        _native.address(bias), dense.data_ptr(), scratch.data_ptr(), a.shape[0], a.shape[1],
        b.shape[2], *a.stride(), *b.stride(), b.shape[0], _native.DTYPES[a.dtype],
        STORAGES[b.dtype], _native.DTYPES[out.dtype],
    )  # fmt: skip
    if dense is not out:
        out.copy_(dense)


def _gemm_implementation(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = huge_pages(_gemm_output(a, b, offsets, bias, dtype))
    _run(a, b, offsets, bias, out)
    return out


def _gemm_output(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _check_gemm(a, b, offsets, bias, "out_dtype", dtype)
    return a.new_empty((a.shape[0], b.shape[2]), dtype=dtype)


def _gemm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offsets, _, _ = inputs
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, offsets)
    ctx.dtype, ctx.strides = a.dtype, b.stride()


def _gemm_backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets = ctx.saved_tensors
    dc = dc.to(ctx.dtype)
    da = db = dbias = None
    if ctx.needs_input_grad[0]:
        da = gemm(dc, b.transpose(1, 2), offsets, None, ctx.dtype)
    if ctx.needs_input_grad[1]:  # in b's own stride order, so that .grad needs no copy
        _, stride_k, stride_n = ctx.strides
        if stride_k < stride_n:
            db = wgrad(dc, a, offsets, ctx.dtype).transpose(1, 2)
        else:
            db = wgrad(a, dc, offsets, ctx.dtype)
    if ctx.needs_input_grad[3]:
        dbias = wgrad(dc.new_ones((dc.shape[0], 1)), dc, offsets, ctx.dtype).squeeze(1)
    return da, db, None, dbias, None


gemm = register(
    "grouped_gemm(Tensor a, Tensor b, Tensor offsets, Tensor? bias, ScalarType dtype) -> Tensor",
    _gemm_implementation,
    _gemm_output,
    _gemm_context,
    _gemm_backward,
)


def _gemm_out_implementation(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    _gemm_out_fake(a, b, offsets, bias, out)
    _check.writable("grouped_gemm", out, a=a, b=b, offsets=offsets, bias=bias)
    _run(a, b, offsets, bias, out)
    torch.autograd.graph.increment_version(out)


def _gemm_out_fake(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor) -> None:
    _check_gemm(a, b, offsets, bias, "out", out.dtype)
    check_out("grouped_gemm", out, [a.shape[0], b.shape[2]], a)


def check_out(op: str, out: Tensor, shape: list[int], a: Tensor) -> None:
    if list(out.shape) != shape or out.device != a.device:
        raise ValueError(
            f"{op}: out: expected shape {shape} on {a.device}, got {list(out.shape)} on "
            f"{out.device}; allocate it with that shape"
        )


gemm_out = register(
    "grouped_gemm_out(Tensor a, Tensor b, Tensor offsets, Tensor? bias, Tensor(a!) out) -> ()",
    _gemm_out_implementation,
    _gemm_out_fake,
)

# ---- grouped_gemm_wgrad


def _check_wgrad(a: Tensor, dc: Tensor, offsets: Tensor, name: str, dtype: torch.dtype) -> None:
    op = "grouped_gemm_wgrad"
    _check_pair(op, a, "dc", dc, a.dim() == 2 and dc.dim() == 2, "[R, K] and [R, N]")
    if a.shape[0] != dc.shape[0]:
        raise ValueError(
            f"{op}: dc: expected {a.shape[0]} rows, got {dc.shape[0]}; pass the gradient of a's "
            "rows"
        )
    check_offsets(op, offsets, None, a)
    check_dtype(op, name, a, dtype)


def _run_wgrad(a: Tensor, dc: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    if a.is_cuda or not is_native(a):
        check_offset_values("grouped_gemm_wgrad", offsets, a.shape[0])
    if not is_native(a):
        reference.wgrad(a, dc, offsets, out, accumulate)
        return
    target = out
    if 1 not in out.stride()[1:] and out.shape[1] > 1 and out.shape[2] > 1:
        target = (
            out.contiguous()
            if accumulate
            else torch.empty_like(out, memory_format=torch.contiguous_format)
        )
    a, dc, offsets = with_a_unit_stride(a), with_a_unit_stride(dc), offsets.contiguous()
    experts, dtype = offsets.shape[0], _native.DTYPES[a.dtype]
    scratch = workspace("grouped_gemm_wgrad", a, experts, dtype)
    _native.call(
        "grouped_gemm_wgrad", a, a.data_ptr(), dc.data_ptr(), offsets.data_ptr(),
        target.data_ptr(), scratch.data_ptr(), a.shape[0], a.shape[1], dc.shape[1], *a.stride(),
        *dc.stride(), *target.stride(), experts, accumulate, dtype, _native.DTYPES[out.dtype],
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _wgrad_implementation(a: Tensor, dc: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    out = huge_pages(_wgrad_output(a, dc, offsets, dtype))
    _run_wgrad(a, dc, offsets, out, False)
    return out


def _wgrad_output(a: Tensor, dc: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    _check_wgrad(a, dc, offsets, "out_dtype", dtype)
    return a.new_empty((offsets.shape[0], a.shape[1], dc.shape[1]), dtype=dtype)


wgrad = register(
    "grouped_gemm_wgrad(Tensor a, Tensor dc, Tensor offsets, ScalarType dtype) -> Tensor",
    _wgrad_implementation,
    _wgrad_output,
)


def _wgrad_out_implementation(
    a: Tensor, dc: Tensor, offsets: Tensor, out: Tensor, accumulate: bool
) -> None:
    _wgrad_out_fake(a, dc, offsets, out, accumulate)
    _check.writable("grouped_gemm_wgrad", out, a=a, dc=dc, offsets=offsets)
    _run_wgrad(a, dc, offsets, out, accumulate)
    torch.autograd.graph.increment_version(out)


def _wgrad_out_fake(a: Tensor, dc: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    _check_wgrad(a, dc, offsets, "out", out.dtype)
    check_out("grouped_gemm_wgrad", out, [offsets.shape[0], a.shape[1], dc.shape[1]], a)


wgrad_out = register(
    "grouped_gemm_wgrad_out(Tensor a, Tensor dc, Tensor offsets, Tensor(a!) out, bool accumulate) "
    "-> ()",
    _wgrad_out_implementation,
    _wgrad_out_fake,
)

# ---- quantised weights: no gradient of their own, kimi_ops.quantized adds that of the rows


def _quantized_implementation(
    a: Tensor, data: Tensor, scale: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = huge_pages(_quantized_output(a, data, scale, offsets, bias, dtype))
    if a.device.type != "cpu":
        raise TypeError(
            f"quantized_gemm: a: expected a CPU tensor, got {a.device}; dequantise the weight"
        )
    a, offsets = with_a_unit_stride(a), offsets.contiguous()
    bias = None if bias is None else bias.contiguous()
    experts, n, k = data.shape[0], data.shape[1], a.shape[1]
    scratch = workspace("grouped_gemm", a, experts, _native.DTYPES[a.dtype])
    words = data.shape[2] * 8 if data.dtype == torch.int32 else data.shape[2]
    _native.call(
        "grouped_gemm", a, a.data_ptr(), data.data_ptr(), scale.data_ptr(), offsets.data_ptr(),
        _native.address(bias), out.data_ptr(), scratch.data_ptr(), a.shape[0], k, n, *a.stride(),
        n * words, 1, words, experts, _native.DTYPES[a.dtype], STORAGES[data.dtype],
        _native.DTYPES[dtype],
    )  # fmt: skip
    return out


def _quantized_output(
    a: Tensor, data: Tensor, scale: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    op = "quantized_gemm"
    _check.dtype(op, "a", a, tuple(_native.DTYPES))
    _check.shape(op, "a", a, ("R", "K"))
    _check.dtype(op, "data", data, (torch.float8_e4m3fn, torch.int32))
    packed = data.dtype == torch.int32
    n, k = data.shape[1], a.shape[1]
    _check.shape(op, "data", data, ("E", "N", -(-k // 8) if packed else k))
    grid = (n, -(-k // 32)) if packed else (-(-n // 128), -(-k // 128))
    _check.dtype(op, "scale", scale, (torch.bfloat16 if packed else torch.float32,))
    _check.shape(op, "scale", scale, (data.shape[0], *grid))
    if not (data.is_contiguous() and scale.is_contiguous()):
        raise ValueError(
            f"{op}: data, scale: expected contiguous tensors, got strides {data.stride()} and "
            f"{scale.stride()}; call .contiguous()"
        )
    check_offsets(op, offsets, data.shape[0], a)
    check_dtype(op, "out_dtype", a, dtype)
    check_bias(op, a, bias, data.shape[0], n)
    return a.new_empty((a.shape[0], n), dtype=dtype)


quantized = register(
    "quantized_gemm(Tensor a, Tensor data, Tensor scale, Tensor offsets, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    _quantized_implementation,
    _quantized_output,
)
