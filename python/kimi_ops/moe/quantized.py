# SPDX-License-Identifier: MIT
"""Read-only expert weights in the forms of the released checkpoints: FP8 blocks and INT4 groups.

`grouped_gemm` and `fused_experts` take them in place of a stack of matrices, on the CPU; beside
`Fp8Rows` `grouped_gemm` takes `Fp8BlockWeight` on a GPU too. On the CPU a weight is dequantised to
the dtype of the activations, one expert at a time: a token reads half (FP8) or about a quarter
(INT4) of the bytes that bfloat16 weights have.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from kimi_ops import _check, formats
from kimi_ops.moe.fp8_rows import Fp8Rows
from kimi_ops.operators import grouped_gemm as _ops
from kimi_ops.reference import grouped_gemm as reference

__all__ = ["Fp8BlockWeight", "Fp8Rows", "Int4GroupWeight", "QuantizedWeight", "quantized_gemm"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedWeight(ABC):
    """What both forms share: the logical shape [E, N, K], and one expert's matrix at a time."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[E, N, K], the layout of `torch.nn.Linear` for each expert."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def expert(self, index: int, dtype: torch.dtype) -> Tensor:
        """[N, K] of one expert: q * scale in fp32, rounded once to `dtype`."""

    @classmethod
    @abstractmethod
    def empty(
        cls, experts: int, rows: int, columns: int, *, device: torch.device | str = "cpu"
    ) -> Self:
        """Unset memory for weights of shape [experts, rows, columns]."""

    @staticmethod
    @abstractmethod
    def _quantize_matrix(weight: Tensor) -> tuple[Tensor, Tensor]: ...

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """Quantise a stack of matrices, to the nearest values that the form holds.

        Parameters
        ----------
        weight : Tensor [E, N, K] bfloat16, float16 or float32
            Finite: on a GPU one flag is read back for that. For INT4 K is a multiple of 8.

        Raises
        ------
        TypeError, ValueError
            Another dtype or shape, infinities or NaN.
        """
        op = f"{cls.__name__}.quantize"
        _check.tensor(op, "weight", weight)
        _check.dtype(op, "weight", weight, _FLOATS)
        _check.shape(op, "weight", weight, ["E", "N", "K"], "stack the experts' matrices")
        _check_columns(op, cls, weight.shape[2])
        if not torch.isfinite(weight).all():
            raise ValueError(f"{op}: weight: expected finite values, got infinities or NaN")
        result = cls.empty(*weight.shape, device=weight.device)
        for index, matrix in enumerate(weight.detach()):
            parts = zip(result.tensors().values(), cls._quantize_matrix(matrix), strict=True)
            for target, value in parts:
                target[index] = value
        return result

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole stack [E, N, K] in `dtype`, rounded as `grouped_gemm` rounds it."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.device)
        for index in range(self.shape[0]):
            weight[index] = self.expert(index, dtype)
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, device='{self.device}')"


@dataclass(frozen=True, eq=False, repr=False)
class Fp8BlockWeight(QuantizedWeight):
    """Weights [E, N, K] in FP8: ``W[e, n, k] = data[e, n, k] * scale[e, n // 128, k // 128]``.

    Parameters
    ----------
    data : Tensor [E, N, K] float8_e4m3fn, contiguous
    scale : Tensor [E, ceil(N / 128), ceil(K / 128)] float32, contiguous
        Multiplied, like the ``weight_scale_inv`` of the files. Blocks at the edges may be ragged.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape, device or stride order.

    Notes
    -----
    Read only: gradients flow to the activations, never to the weight. Source: DeepSeek-V3
    (arXiv 2412.19437), section 3.3; Kimi-K2-Base and -Instruct are released in this form.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import Fp8BlockWeight, grouped_gemm
    >>> w = Fp8BlockWeight.quantize(torch.randn(2, 300, 200))
    >>> w.scale.shape
    torch.Size([2, 3, 2])
    >>> grouped_gemm(torch.randn(5, 200), w, torch.tensor([2, 5], dtype=torch.int32)).shape
    torch.Size([5, 300])
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        op = type(self).__name__
        _check_stack(op, "data", self.data, torch.float8_e4m3fn, ["E", "N", "K"])
        grid = [-(-size // formats.FP8_BLOCK) for size in self.data.shape[1:]]
        shape = [self.data.shape[0], *grid]
        _check_stack(op, "scale", self.scale, torch.float32, shape)
        _check.same_device(op, "scale", self.scale, "data", self.data)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    @classmethod
    def empty(
        cls, experts: int, rows: int, columns: int, *, device: torch.device | str = "cpu"
    ) -> Self:
        grid = [-(-size // formats.FP8_BLOCK) for size in (rows, columns)]
        data = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device=device)
        return cls(data, torch.empty(experts, *grid, device=device, dtype=torch.float32))

    @staticmethod
    def _quantize_matrix(weight: Tensor) -> tuple[Tensor, Tensor]:
        return formats.quantize_fp8(weight)

    def expert(self, index: int, dtype: torch.dtype) -> Tensor:
        return formats.dequantize_fp8(self.data[index], self.scale[index]).to(dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Int4GroupWeight(QuantizedWeight):
    """Weights [E, N, K] in INT4: ``W[e, n, k] = (nibble[e, n, k] - 8) * scale[e, n, k // 32]``.

    Parameters
    ----------
    packed : Tensor [E, N, K / 8] int32, contiguous
        Eight unsigned nibbles a word; k = 8 w + i lies in bits 4 i .. 4 i + 3 of word w. K is a
        multiple of 8.
    scale : Tensor [E, N, ceil(K / 32)] bfloat16, contiguous
        The last group may be ragged.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape, device or stride order.

    Notes
    -----
    Read only: gradients flow to the activations, never to the weight. `quantize` uses the values
    -7 .. 7 and ``scale = max |W| / 7``. Source: the ``pack-quantized`` format of
    compressed-tensors, in which the experts of Kimi-K2-Thinking and its successors are released.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import Int4GroupWeight
    >>> w = Int4GroupWeight.quantize(torch.tensor([[[7.0, -7, 1, 0, 2, 3, 4, 5]]]))
    >>> hex(w.packed.item() & 0xFFFFFFFF), w.dequantize(torch.float32)[0, 0, 1].item()
    ('0xdcba891f', -7.0)
    """

    packed: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        op = type(self).__name__
        _check_stack(op, "packed", self.packed, torch.int32, ["E", "N", "K / 8"])
        experts, rows, columns = self.shape
        shape = [experts, rows, -(-columns // formats.INT4_GROUP)]
        _check_stack(op, "scale", self.scale, torch.bfloat16, shape)
        _check.same_device(op, "scale", self.scale, "packed", self.packed)

    @property
    def shape(self) -> torch.Size:
        experts, rows, words = self.packed.shape
        return torch.Size((experts, rows, formats.INT4_WORD * words))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @classmethod
    def empty(
        cls, experts: int, rows: int, columns: int, *, device: torch.device | str = "cpu"
    ) -> Self:
        _check_columns(f"{cls.__name__}.empty", cls, columns)
        words, groups = columns // formats.INT4_WORD, -(-columns // formats.INT4_GROUP)
        packed = torch.empty(experts, rows, words, dtype=torch.int32, device=device)
        return cls(packed, torch.empty(experts, rows, groups, dtype=torch.bfloat16, device=device))

    @staticmethod
    def _quantize_matrix(weight: Tensor) -> tuple[Tensor, Tensor]:
        return formats.quantize_int4(weight)

    def expert(self, index: int, dtype: torch.dtype) -> Tensor:
        return formats.dequantize_int4(self.packed[index], self.scale[index]).to(dtype)


def _check_columns(op: str, form: type[QuantizedWeight], columns: int) -> None:
    if form is Int4GroupWeight and columns % formats.INT4_WORD:
        raise ValueError(
            f"{op}: weight: expected K, the last size, as a multiple of 8 nibbles a word, got "
            f"{columns}; pad it with zeros"
        )


def _check_stack(
    op: str, name: str, value: Tensor, dtype: torch.dtype, shape: list[int] | list[str]
) -> None:
    _check.tensor(op, name, value)
    _check.dtype(op, name, value, [dtype], "quantize makes both tensors from a weight")
    _check.shape(op, name, value, shape)
    if not value.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected a contiguous tensor, got strides {value.stride()}; call "
            ".contiguous()"
        )


class _Stack:
    """The b [E, K, N] that a quantised weight stands for, as `reference.forward` reads it."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, transposed: bool) -> None:
        self._weight, self._dtype, self._transposed = weight, dtype, transposed
        experts, rows, columns = weight.shape
        self.shape = (experts, rows, columns) if transposed else (experts, columns, rows)

    def __getitem__(self, index: int) -> Tensor:
        matrix = self._weight.expert(index, self._dtype)
        return matrix if self._transposed else matrix.t()


def _product(
    a: Tensor,
    weight: QuantizedWeight,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
    transposed: bool,
) -> Tensor:
    stack: Any = _Stack(weight, a.dtype, transposed)
    return reference.forward(a, stack, offsets, bias, out)


def _forward(
    a: Tensor, weight: QuantizedWeight, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The kernel dequantises in registers; float64 goes through the twin."""
    if _ops.is_native(a):
        return _ops.quantized(a, *weight.tensors().values(), offsets, bias, dtype)
    _ops.check_offset_values("grouped_gemm", offsets, a.shape[0])
    out = a.new_empty(a.shape[0], weight.shape[1], dtype=dtype)
    return _product(a, weight, offsets, bias, out, transposed=False)


class _QuantizedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        weight: QuantizedWeight,
        offsets: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight, ctx.dtype = weight, a.dtype
        return _forward(a, weight, offsets, bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        da = dbias = None
        dc = dc.contiguous().to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            da = dc.new_empty(dc.shape[0], ctx.weight.shape[2])
            _product(dc, ctx.weight, offsets, None, da, transposed=True)
        if ctx.needs_input_grad[3]:
            ones, shape = dc.new_ones(dc.shape[0], 1), (offsets.numel(), 1, dc.shape[1])
            dbias = reference.wgrad(ones, dc, offsets, dc.new_empty(shape), accumulate=False)[:, 0]
        return da, None, None, dbias, None


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
    _check_gemm(a, weight, offsets, bias, dtype)
    if out is None:
        return _QuantizedGemm.apply(a, weight, offsets, bias, dtype)
    return out.copy_(_forward(a, weight, offsets, bias, dtype))


def _check_gemm(
    a: Tensor, weight: QuantizedWeight, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    op = "grouped_gemm"
    experts, n, k = weight.shape
    _check.dtype(op, "a", a, (*_FLOATS, torch.float64))
    if a.dim() != 2 or a.shape[1] != k:
        raise ValueError(
            f"{op}: a: expected shape [R, K={k}] beside a quantised weight {list(weight.shape)} "
            f"[E, N, K], got {list(a.shape)}; reshape it"
        )
    if a.device != weight.device:
        raise ValueError(f"{op}: b: expected device {a.device}, got {weight.device}; move it")
    if a.device.type != "cpu":
        raise ValueError(
            f"{op}: b: expected a Tensor on {a.device}, got {type(weight).__name__}, which is "
            "served on the CPU only; pass b.dequantize(a.dtype).transpose(1, 2)"
        )
    _ops.check_offsets(op, offsets, experts, a)
    _ops.check_dtype(op, "out_dtype", a, dtype)
    _ops.check_bias(op, a, bias, experts, n)
