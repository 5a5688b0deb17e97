# SPDX-License-Identifier: MIT
"""FP8 rows, and their product with FP8 blocks.

The product's kernel is for Hopper; the native function checks and leaves the rest to this file: on
the CPU rows are dequantised to float32 for the kernel that reads FP8 weights; on other GPUs both
are dequantised to bfloat16; operands that TMA cannot read are copied.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import _native, formats
from kimi_ops.operators.grouped_gemm import grouped_gemm, nothing, quantized_gemm
from kimi_ops.operators.registry import Operator
from kimi_ops.reference.grouped_gemm import expert_of_row, live_rows

FP8 = torch.float8_e4m3fn
_TMA_BYTES = 16  # what TMA wants addresses and strides to be multiples of
_SCALE_ROWS = _TMA_BYTES // 4

_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


def _scales_like(x: Tensor, rows: int, columns: int) -> Tensor:
    """Unset scales [R, columns] where rows lie side by side, as the kernel reads them."""
    padded = -(-rows // _SCALE_ROWS) * _SCALE_ROWS
    return x.new_empty_strided((rows, columns), (1, padded), dtype=torch.float32)


# ---- rows


def _rows_output(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scales_like(x, x.shape[0], formats.blocks(x.shape[1]))
    return x.new_empty(x.shape, dtype=FP8), scale


fp8_rows = Operator("fp8_rows(Tensor x) -> (Tensor, Tensor)", _rows_output, differentiable=False)

# ---- product


def _product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    engine = _native.engine
    if engine.grouped_gemm_fp8_served(a):
        a, b, a_scale = _readable_rows(a), _readable_weight(b), _readable_scales(a_scale)
        return engine.grouped_gemm_fp8(a, a_scale, b, b_scale, offsets, bias, dtype)
    return _dequantized(a, a_scale, b, b_scale, offsets, bias).to(dtype)


def _product_output(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


def _product_out(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    out.copy_(_product(a, a_scale, b, b_scale, offsets, bias, out.dtype))


def _pad_columns(x: Tensor) -> Tensor:
    """A copy with zeros up to a multiple of 16 columns, at an address that 16 divides."""
    missing = -x.shape[-1] % _TMA_BYTES
    return F.pad(x.view(torch.uint8), (0, missing)).view(FP8) if missing else x.clone()


def _readable_rows(a: Tensor) -> Tensor:
    one = a.shape[0] <= 1
    steps = a.data_ptr() | (0 if one else a.stride(0)) | a.shape[1]
    if steps % _TMA_BYTES == 0 and (one or a.stride(0) >= a.shape[1]):
        return a
    dense = a.contiguous()
    readable = (dense.data_ptr() | dense.shape[1]) % _TMA_BYTES == 0
    return dense if readable else _pad_columns(dense)


def _readable_weight(b: Tensor) -> Tensor:
    if (b.data_ptr() | b.shape[2]) % _TMA_BYTES == 0:
        return b
    _warn_once(
        f"grouped_gemm: b: expected K as a multiple of 16 values at an address that 16 divides, "
        f"got K = {b.shape[2]} at {b.data_ptr() % _TMA_BYTES} beyond one: the weights are copied "
        "at each call; pad K with zeros before quantize"
    )
    return _pad_columns(b)


def _readable_scales(scale: Tensor) -> Tensor:
    count, columns = scale.shape
    step = scale.stride(1)
    side_by_side = scale.stride(0) == 1 or count == 1
    strided = step % _SCALE_ROWS == 0 and step >= count
    if scale.data_ptr() % _TMA_BYTES == 0 and side_by_side and strided:
        return scale
    return _scales_like(scale, count, columns).copy_(scale)


def _dequantized(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """The product in float32."""
    wide = formats.dequantize_rows(a, a_scale)
    kernels = a.is_cuda or _native.engine.cpu_tensors_go_to_cuda()
    if not kernels and b.numel() > 0:
        wide_bias = None if bias is None else bias.float()
        return quantized_gemm(wide, b, b_scale, offsets, wide_bias, torch.float32)
    if b.numel() == 0:
        return _biased(wide.new_zeros(a.shape[0], b.shape[1]), offsets, bias)
    _warn_once(
        "grouped_gemm: a: expected a GPU of compute capability 9.x for FP8 rows, got another: rows "
        "and weights are dequantised to bfloat16 at each call; dequantize() them once instead"
    )
    weight = torch.empty(b.shape, dtype=torch.bfloat16, device=b.device)
    for e in range(b.shape[0]):
        weight[e] = formats.dequantize_fp8(b[e], b_scale[e])
    c = grouped_gemm(wide.bfloat16(), weight.transpose(1, 2), offsets, None, torch.float32, None)
    return _biased(c, offsets, bias)


def _biased(c: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """c with the bias of each row's group; rows past the last group have none."""
    if bias is None:
        return c
    rows = c.shape[0]
    return c + bias[expert_of_row(rows, offsets)].masked_fill(~live_rows(rows, offsets), 0)


grouped_gemm_fp8 = Operator(
    "grouped_gemm_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    _product_output,
    otherwise=_product,
    differentiable=False,
)
grouped_gemm_fp8_out = Operator(
    "grouped_gemm_fp8_out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, "
    "Tensor? bias, Tensor(a!) out) -> ()",
    nothing,
    otherwise=_product_out,
)
