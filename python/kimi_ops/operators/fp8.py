# SPDX-License-Identifier: MIT
"""The operators behind `Fp8Rows.quantize` and `grouped_gemm` of FP8 rows and FP8 blocks.

The product's kernel is for Hopper. On the CPU rows are dequantised to float32 for
the kernel that reads FP8 weights; on other GPUs both are dequantised to bfloat16.
"""

import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import _check, _native, formats
from kimi_ops.operators import grouped_gemm as _ops
from kimi_ops.operators.registry import define
from kimi_ops.reference.grouped_gemm import expert_of_row, live_rows

FP8 = torch.float8_e4m3fn
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TMA_BYTES = 16  # what TMA wants addresses and strides to be multiples of
_SCALE_ROWS = _TMA_BYTES // 4

_warned: set[str] = set()


def warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


def blocks(size: int) -> int:
    return -(-size // formats.FP8_BLOCK)


def scales_like(x: Tensor, rows: int, columns: int) -> Tensor:
    """Unset scales [R, columns] where rows lie side by side, as the kernel reads them."""
    padded = -(-rows // _SCALE_ROWS) * _SCALE_ROWS
    return x.new_empty_strided((rows, columns), (1, padded), dtype=torch.float32)


# ---- rows


def _rows_implementation(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    data, scale = _rows_output(x)
    row_stride = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    _native.call(
        "fp8_rows", x, x.data_ptr(), data.data_ptr(), scale.data_ptr(), *x.shape, row_stride,
        scale.stride(1), _native.DTYPES[x.dtype],
    )  # fmt: skip
    return data, scale


def _rows_output(x: Tensor) -> tuple[Tensor, Tensor]:
    _check.dtype("fp8_rows", "x", x, tuple(_native.DTYPES))
    _check.shape("fp8_rows", "x", x, ("R", "K"))
    return x.new_empty(x.shape, dtype=FP8), scales_like(x, x.shape[0], blocks(x.shape[1]))


rows = define("fp8_rows(Tensor x) -> (Tensor, Tensor)", _rows_implementation, _rows_output)

# ---- product


def served(like: Tensor) -> bool:
    """Whether the product of tensors on the device of `like` has a kernel of its own."""
    module, code = _engine(like)
    if not like.is_cuda:
        return module.grouped_gemm_fp8_served(code)
    with torch.cuda.device(like.device):
        return module.grouped_gemm_fp8_served(code)


def _engine(like: Tensor) -> tuple[ModuleType, int]:
    return (_native._C, _native.CUDA) if like.is_cuda else _native.cpu_engine


def _run(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    offsets = offsets.contiguous()
    if _engine(a)[1] == _native.CPU:
        _ops.check_offset_values("grouped_gemm", offsets, a.shape[0])
        if b.numel() == 0:
            out.copy_(_biased(out.new_zeros(out.shape, dtype=torch.float32), offsets, bias))
            return
        wide = formats.dequantize_rows(a, a_scale)
        wide_bias = None if bias is None else bias.float()
        out.copy_(_ops.quantized(wide, b, b_scale, offsets, wide_bias, torch.float32))
        return
    _ops.check_offset_values("grouped_gemm", offsets, a.shape[0])
    if not served(a):
        _dequantized(a, a_scale, b, b_scale, offsets, bias, out)
        return
    a, b = _readable_rows(a), _readable_weight(b)
    a_scale = _readable_scales(a_scale)
    bias = None if bias is None else bias.contiguous()
    dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=a.device)
    _native.call(
        "grouped_gemm_fp8", a, a.data_ptr(), a_scale.data_ptr(), b.data_ptr(), b_scale.data_ptr(),
        offsets.data_ptr(), _native.address(bias), dense.data_ptr(), a.shape[0], a.shape[1],
        b.shape[1], a.stride(0) if a.shape[0] > 1 else a.shape[1],
        a_scale.stride(1), b.shape[0], _native.DTYPES[out.dtype],
    )  # fmt: skip
    if dense is not out:
        out.copy_(dense)


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
    warn_once(
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
    return scales_like(scale, count, columns).copy_(scale)


def _dequantized(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    warn_once(
        "grouped_gemm: a: expected a GPU of compute capability 9.x for FP8 rows, got another: rows "
        "and weights are dequantised to bfloat16 at each call; dequantize() them once instead"
    )
    wide = torch.empty(b.shape, dtype=torch.bfloat16, device=b.device)
    for e in range(b.shape[0]):
        wide[e] = formats.dequantize_fp8(b[e], b_scale[e])
    a = formats.dequantize_rows(a, a_scale).bfloat16()
    c = _ops.gemm(a, wide.transpose(1, 2), offsets, None, torch.float32)
    out.copy_(_biased(c, offsets, bias))


def _biased(c: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """c with the bias of each row's group; rows past the last group have none."""
    if bias is None:
        return c
    rows = c.shape[0]
    return c + bias[expert_of_row(rows, offsets)].masked_fill(~live_rows(rows, offsets), 0)


def _check_product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    name: str,
    dtype: torch.dtype,
) -> None:
    op = "grouped_gemm"
    _check.dtype(op, "a.data", a, (FP8,))
    _check.dtype(op, "b.data", b, (FP8,))
    _check.shape(op, "b.data", b, ("E", "N", "K"))
    experts, n, k = b.shape
    _check.shape(op, "a.data", a, ("R", k), f"pass rows of the K = {k} of b")
    for scale_name, scale, shape in (
        ("a.scale", a_scale, (a.shape[0], blocks(k))),
        ("b.scale", b_scale, (experts, blocks(n), blocks(k))),
    ):
        _check.dtype(op, scale_name, scale, (torch.float32,))
        _check.shape(op, scale_name, scale, shape)
        _check.same_device(op, scale_name, scale, "a.data", a)
    _check.same_device(op, "b", b, "a.data", a)
    if not (b.is_contiguous() and b_scale.is_contiguous()):
        raise ValueError(
            f"{op}: b: expected contiguous tensors, got strides {b.stride()} and "
            f"{b_scale.stride()}; call .contiguous()"
        )
    if a.stride(1) != 1 and k > 1:
        raise ValueError(
            f"{op}: a.data: expected contiguous columns, got strides {a.stride()}; call "
            ".contiguous()"
        )
    _ops.check_offsets(op, offsets, experts, a)
    if dtype not in OUT_DTYPES:
        raise TypeError(
            f"{op}: {name}: expected torch.bfloat16, torch.float16 or torch.float32 beside FP8 "
            f"rows, got {dtype}; choose one of these"
        )
    if bias is not None:
        _check.dtype(op, "bias", bias, (dtype,))
        _check.shape(op, "bias", bias, (experts, n), "pass one row for each expert")
        _check.same_device(op, "bias", bias, "a.data", a)


def _product_implementation(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out = _product_output(a, a_scale, b, b_scale, offsets, bias, dtype)
    _run(a, a_scale, b, b_scale, offsets, bias, out)
    return out


def _product_output(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    _check_product(a, a_scale, b, b_scale, offsets, bias, "out_dtype", dtype)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


product = define(
    "grouped_gemm_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    _product_implementation,
    _product_output,
)


def _product_out_implementation(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    _product_out_fake(a, a_scale, b, b_scale, offsets, bias, out)
    inputs = {"a": a, "a.scale": a_scale, "b": b, "b.scale": b_scale}
    _check.writable("grouped_gemm", out, **inputs, offsets=offsets, bias=bias)
    _run(a, a_scale, b, b_scale, offsets, bias, out)
    torch.autograd.graph.increment_version(out)


def _product_out_fake(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    _check_product(a, a_scale, b, b_scale, offsets, bias, "out", out.dtype)
    _ops.check_out("grouped_gemm", out, [a.shape[0], b.shape[1]], a)


product_out = define(
    "grouped_gemm_fp8_out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, "
    "Tensor? bias, Tensor(a!) out) -> ()",
    _product_out_implementation,
    _product_out_fake,
)
