# SPDX-License-Identifier: MIT
"""Rows of activations in FP8, and their product with FP8 weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from kimi_ops import _check, formats
from kimi_ops.operators import fp8 as _ops

if TYPE_CHECKING:
    from kimi_ops.moe.quantized import Fp8BlockWeight

__all__ = ["Fp8Rows", "fp8_gemm"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False, repr=False)
class Fp8Rows:
    """Rows [R, K] in FP8: ``x[r, k] = data[r, k] * scale[r, k // 128]``.

    Parameters
    ----------
    data : Tensor [R, K] float8_e4m3fn, columns contiguous
    scale : Tensor [R, ceil(K / 128)] float32, any strides
        The kernel reads it with rows side by side, as `quantize` makes it; others are copied.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape, device or stride order.

    Notes
    -----
    For `grouped_gemm` with a `Fp8BlockWeight`; no gradients. Source: DeepSeek-V3
    (arXiv 2412.19437), section 3.3.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import Fp8BlockWeight, Fp8Rows, grouped_gemm
    >>> x, w = torch.randn(5, 200), torch.randn(2, 300, 200)
    >>> rows = Fp8Rows.quantize(x)
    >>> rows.scale.shape
    torch.Size([5, 2])
    >>> offsets = torch.tensor([2, 5], dtype=torch.int32)
    >>> grouped_gemm(rows, Fp8BlockWeight.quantize(w), offsets).dtype
    torch.bfloat16
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        op = type(self).__name__
        _check.tensor(op, "data", self.data)
        _check.dtype(op, "data", self.data, (_ops.FP8,), "quantize makes both tensors from rows")
        _check.shape(op, "data", self.data, ("R", "K"))
        if self.data.shape[1] > 1 and self.data.stride(1) != 1:
            raise ValueError(
                f"{op}: data: expected contiguous columns, got strides {self.data.stride()}; call "
                ".contiguous()"
            )
        _check.tensor(op, "scale", self.scale)
        _check.dtype(op, "scale", self.scale, (torch.float32,))
        shape = (self.data.shape[0], _ops.blocks(self.data.shape[1]))
        _check.shape(op, "scale", self.scale, shape)
        _check.same_device(op, "scale", self.scale, "data", self.data)

    @classmethod
    def quantize(cls, x: Tensor) -> Self:
        """Quantise rows: ``scale = max |x| of 128 columns / 448``, values to the nearest e4m3.

        Parameters
        ----------
        x : Tensor [R, K] bfloat16, float16 or float32
            128 columns that hold infinities or NaN become NaN: nothing is read back to refuse them.

        Raises
        ------
        TypeError, ValueError
            Another dtype or shape; x requires a gradient while gradients are recorded.
        """
        op = f"{cls.__name__}.quantize"
        _check.tensor(op, "x", x)
        _check.dtype(op, "x", x, _FLOATS)
        _check.shape(op, "x", x, ("R", "K"))
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{op}: x: no gradient flows through FP8 rows, but it requires one; pass "
                "x.detach() or call under torch.no_grad()"
            )
        return cls(*_ops.rows(x.detach()))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[R, K]: data * scale in fp32, rounded once to `dtype`."""
        return formats.dequantize_rows(self.data, self.scale).to(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, device='{self.device}')"


def fp8_gemm(
    a: Fp8Rows,
    weight: "Fp8BlockWeight",
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
    if a.device != weight.device:
        raise ValueError(
            f"grouped_gemm: b: expected device {a.device}, got {weight.device}; move it"
        )
    operands = a.data, a.scale, weight.data, weight.scale, offsets, bias
    if out is None:
        return _ops.product(*operands, dtype)
    _ops.product_out(*operands, out)
    return out
