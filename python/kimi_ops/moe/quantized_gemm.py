# SPDX-License-Identifier: MIT
"""Products with quantised weights: of float rows, differentiable, and of FP8 rows."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.moe.quantized import Fp8BlockWeight, Fp8Rows, QuantizedWeight
from kimi_ops.operators import fp8
from kimi_ops.operators import grouped_gemm as operators
from kimi_ops.operators.registry import refuse_batch
from kimi_ops.reference import grouped_gemm as reference


def _forward(
    a: Tensor, weight: QuantizedWeight, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The kernel dequantises in registers; float64 goes through the twin."""
    arguments = (a, *weight.tensors().values(), offsets, bias, dtype)
    if a.dtype != torch.float64:
        return operators.quantized_gemm(*arguments)
    _native.engine.quantized_gemm(*arguments)  # checks, and leaves it
    matrices = weight.dequantize(a.dtype).transpose(1, 2)
    return reference.grouped_gemm(a, matrices, offsets, bias, out_dtype=dtype)


class _QuantizedGemm(torch.autograd.Function):
    vmap = staticmethod(refuse_batch("grouped_gemm"))

    @staticmethod
    def forward(
        a: Tensor, weight: QuantizedWeight, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return _forward(a, weight, offsets, bias, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, ctx.weight, offsets, _, _ = inputs
        ctx.save_for_backward(offsets)
        ctx.dtype = a.dtype

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        da = dbias = None
        dc = dc.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            da = _RowsGradient.apply(dc, ctx.weight, offsets)
        if ctx.needs_input_grad[3]:
            ones = dc.new_ones(dc.shape[0], 1)
            dbias = operators.grouped_gemm_wgrad(ones, dc, offsets, ctx.dtype, None)[:, 0]
        return da, None, None, dbias, None


class _RowsGradient(torch.autograd.Function):
    """da[r] = dc[r] @ W[e(r)]: linear, so that its own gradient is a product again."""

    vmap = staticmethod(refuse_batch("grouped_gemm"))

    @staticmethod
    def forward(dc: Tensor, weight: QuantizedWeight, offsets: Tensor) -> Tensor:
        return operators.quantized_gemm_dgrad(dc, *weight.tensors().values(), offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.weight, offsets = inputs
        ctx.save_for_backward(offsets)

    @staticmethod
    def backward(ctx: Any, dda: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return quantized_gemm(dda, ctx.weight, offsets, None, None, dda.dtype), None, None


def quantized_gemm(
    a: Tensor,
    weight: QuantizedWeight,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`grouped_gemm` with a quantised weight: c[r] = a[r] @ W[e(r)]^T + bias[e(r)].

    Differentiable in a and bias. Only experts with rows are read.
    """
    if a.device != weight.device:
        raise ValueError(
            f"grouped_gemm: b: expected device {a.device}, got {weight.device}; move it"
        )
    if a.device.type != "cpu":
        raise ValueError(
            f"grouped_gemm: b: expected a Tensor on {a.device}, got {type(weight).__name__}, which "
            "is served on the CPU only; pass b.dequantize(a.dtype).transpose(1, 2)"
        )
    wanted = any(isinstance(t, Tensor) and t.requires_grad for t in (a, bias))
    if out is None and wanted and torch.is_grad_enabled():
        return _QuantizedGemm.apply(a, weight, offsets, bias, dtype)
    result = _forward(a, weight, offsets, bias, dtype)
    if out is None:
        return result
    if out.shape != result.shape or out.device != a.device:
        raise ValueError(
            f"grouped_gemm: out: expected shape {list(result.shape)} on {a.device}, got "
            f"{list(out.shape)} on {out.device}; allocate it with that shape"
        )
    return out.copy_(result)


def fp8_gemm(
    a: Fp8Rows,
    weight: Fp8BlockWeight,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`grouped_gemm` of FP8 rows: c[r] = a[r] @ W[e(r)]^T + bias[e(r)] in `dtype`, or in out's."""
    tensors = (a.data, a.scale, weight.data, weight.scale, bias, out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "grouped_gemm: a: no gradient flows through FP8 rows, but an argument requires one; "
            "call under torch.no_grad(), or pass rows of bfloat16"
        )
    operands = a.data, a.scale, weight.data, weight.scale, offsets, bias
    if out is None:
        return fp8.grouped_gemm_fp8(*operands, dtype)
    fp8.grouped_gemm_fp8_out(*operands, out)
    return out
