# SPDX-License-Identifier: MIT
"""Tensors of 16 or 32 bits go to the kernels; the native function checks float64 too and leaves it
to the torch twin."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops.operators.registry import Operator, wanted
from kimi_ops.reference import grouped_gemm as reference


def _gemm(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype,
    starts: Tensor | None,
) -> Tensor:  # fmt: skip
    out = _gemm_output(a, b, offsets, bias, dtype, starts)
    return reference.forward(a, b, offsets, bias, out, starts)


def _gemm_output(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype,
    starts: Tensor | None,
) -> Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], b.shape[2]), dtype=dtype)


def _gemm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offsets, _, _, starts = inputs
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, offsets, starts)
    ctx.dtype, ctx.strides = a.dtype, b.stride()


def _gemm_backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets, starts = ctx.saved_tensors
    dc = dc.to(ctx.dtype)
    da = db = dbias = None
    if wanted(ctx, 0):
        da = grouped_gemm(dc, b.transpose(1, 2), offsets, None, ctx.dtype, starts)
    if wanted(ctx, 1):  # in b's own stride order, so that .grad needs no copy
        _, stride_k, stride_n = ctx.strides
        if stride_k < stride_n:
            db = grouped_gemm_wgrad(dc, a, offsets, ctx.dtype, starts).transpose(1, 2)
        else:
            db = grouped_gemm_wgrad(a, dc, offsets, ctx.dtype, starts)
    if wanted(ctx, 3):
        ones = dc.new_ones((dc.shape[0], 1))
        dbias = grouped_gemm_wgrad(ones, dc, offsets, ctx.dtype, starts).squeeze(1)
    return da, db, None, dbias, None, None


def _gemm_out(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool,
    starts: Tensor | None,
) -> None:  # fmt: skip
    reference.forward(a, b, offsets, bias, out, starts, accumulate)


def _wgrad(
    a: Tensor, dc: Tensor, offsets: Tensor, dtype: torch.dtype, starts: Tensor | None
) -> Tensor:
    out = _wgrad_output(a, dc, offsets, dtype, starts)
    return reference.wgrad(a, dc, offsets, out, False, starts)


def _wgrad_output(
    a: Tensor, dc: Tensor, offsets: Tensor, dtype: torch.dtype, starts: Tensor | None
) -> Tensor:
    return a.new_empty((offsets.shape[0], a.shape[1], dc.shape[1]), dtype=dtype)


def _wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, dc, offsets, _, starts = inputs
    needs_a, needs_dc = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_dc else None, dc if needs_a else None, offsets, starts)
    ctx.dtype = a.dtype


def _wgrad_backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    """Both operands are rows: each gets the other's rows times its group's matrix."""
    a, dc, offsets, starts = ctx.saved_tensors
    dw = dw.to(ctx.dtype)
    da = ddc = None
    if ctx.needs_input_grad[0]:
        da = grouped_gemm(dc, dw.transpose(1, 2), offsets, None, ctx.dtype, starts)
    if ctx.needs_input_grad[1]:
        ddc = grouped_gemm(a, dw, offsets, None, ctx.dtype, starts)
    return da, ddc, None, None, None


def _wgrad_out(
    a: Tensor, dc: Tensor, offsets: Tensor, out: Tensor, accumulate: bool, starts: Tensor | None
) -> None:
    reference.wgrad(a, dc, offsets, out, accumulate, starts)


def nothing(*_: Any) -> None:
    return None


grouped_gemm = Operator(
    "grouped_gemm(Tensor a, Tensor b, Tensor offsets, Tensor? bias, ScalarType dtype, "
    "Tensor? starts) -> Tensor",
    _gemm_output,
    _gemm_context,
    _gemm_backward,
    otherwise=_gemm,
)
grouped_gemm_out = Operator(
    "grouped_gemm_out(Tensor a, Tensor b, Tensor offsets, Tensor? bias, Tensor(a!) out, "
    "bool accumulate, Tensor? starts) -> ()",
    nothing,
    otherwise=_gemm_out,
)
grouped_gemm_wgrad = Operator(
    "grouped_gemm_wgrad(Tensor a, Tensor dc, Tensor offsets, ScalarType dtype, Tensor? starts) "
    "-> Tensor",
    _wgrad_output,
    _wgrad_context,
    _wgrad_backward,
    otherwise=_wgrad,
)
grouped_gemm_wgrad_out = Operator(
    "grouped_gemm_wgrad_out(Tensor a, Tensor dc, Tensor offsets, Tensor(a!) out, bool accumulate, "
    "Tensor? starts) -> ()",
    nothing,
    otherwise=_wgrad_out,
)

# ---- quantised weights: no gradient of their own, moe.quantized_gemm adds that of the rows


def _quantized_output(
    a: Tensor, data: Tensor, scale: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], data.shape[1]), dtype=dtype)


def _no_float64(*_: Any) -> Tensor:
    raise TypeError(
        "grouped_gemm: a: expected bfloat16, float16 or float32 beside stored tensors, got "
        "float64; kimi_ops.grouped_gemm takes the quantised weight itself"
    )


quantized_gemm = Operator(
    "quantized_gemm(Tensor a, Tensor data, Tensor scale, Tensor offsets, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    _quantized_output,
    otherwise=_no_float64,
)
