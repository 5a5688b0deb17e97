# SPDX-License-Identifier: MIT
"""Stored forms: read-only expert weights as in the released checkpoints (FP8 blocks and INT4
groups), and rows of activations in FP8.

`grouped_gemm` and `fused_experts` take them in place of a stack of matrices, on the CPU; beside
`Fp8Rows` `grouped_gemm` takes `Fp8BlockWeight` on a GPU too. On the CPU a weight is dequantised to
the dtype of the activations, one expert at a time: a token reads half (FP8) or about a quarter
(INT4) of the bytes that bfloat16 weights have.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from kimi_ops import _check, formats
from kimi_ops.operators import fp8

__all__ = ["Fp8BlockWeight", "Fp8Rows", "Int4GroupWeight", "QuantizedWeight"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


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
        _check.dtype(op, "weight", weight, FLOATS)
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

    @classmethod
    def from_mxfp4(cls, packed: Tensor, scale: Tensor) -> Self:
        """MXFP4 weights as FP8 blocks, value for value: twice the bytes, and served.

        Parameters
        ----------
        packed : Tensor [E, N, K / 2] uint8
            Two e2m1 values a byte, the even column in the low bits (``weight_packed`` of
            compressed-tensors; ``_blocks`` [E, N, K / 32, 16] of gpt-oss, flattened).
        scale : Tensor [E, N, K / 32] uint8
            ``2^(scale - 127)`` for 32 columns.

        Raises
        ------
        TypeError, ValueError
            Another dtype or shape; a block of 128 x 128 whose exponents lie more than 14 apart, or
            the exponent 255, NaN: what does not fit is not rounded.

        Notes
        -----
        Reads a flag of each expert back from a GPU. The format: OCP Microscaling 1.0; Kimi K3,
        DeepSeek-V4 and gpt-oss are released in it.

        Examples
        --------
        >>> import torch
        >>> from kimi_ops import Fp8BlockWeight
        >>> packed, scale = torch.full((1, 1, 16), 0x71).byte(), torch.full((1, 1, 1), 128).byte()
        >>> Fp8BlockWeight.from_mxfp4(packed, scale).dequantize(torch.float32)[0, 0, :2].tolist()
        [1.0, 12.0]
        """
        op = f"{cls.__name__}.from_mxfp4"
        for name, value in (("packed", packed), ("scale", scale)):
            _check.tensor(op, name, value)
            _check.dtype(op, name, value, (torch.uint8,), "pass the bytes of the file")
        _check.shape(op, "packed", packed, ("E", "N", "K / 2"))
        experts, rows, half = packed.shape
        if 2 * half % formats.MXFP4_GROUP:
            raise ValueError(
                f"{op}: packed: expected K as a multiple of {formats.MXFP4_GROUP}, got {2 * half}; "
                "pad it with zeros"
            )
        _check.shape(op, "scale", scale, (experts, rows, 2 * half // formats.MXFP4_GROUP))
        _check.same_device(op, "scale", scale, "packed", packed)
        result = cls.empty(experts, rows, 2 * half, device=packed.device)
        for e in range(experts):
            found = formats.mxfp4_to_fp8(packed[e], scale[e])
            if found is None:
                raise ValueError(
                    f"{op}: scale: expected exponents of a block of 128 x 128 within 14 of each "
                    f"other and none that is 255, got others in expert {e}; take "
                    "kimi_ops.formats.dequantize_mxfp4"
                )
            result.data[e], result.scale[e] = found
        return result

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
        _check.dtype(
            op, "data", self.data, (torch.float8_e4m3fn,), "quantize makes both tensors from rows"
        )
        _check.shape(op, "data", self.data, ("R", "K"))
        if self.data.shape[1] > 1 and self.data.stride(1) != 1:
            raise ValueError(
                f"{op}: data: expected contiguous columns, got strides {self.data.stride()}; call "
                ".contiguous()"
            )
        _check.tensor(op, "scale", self.scale)
        _check.dtype(op, "scale", self.scale, (torch.float32,))
        shape = (self.data.shape[0], formats.blocks(self.data.shape[1]))
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
        _check.dtype(op, "x", x, FLOATS)
        _check.shape(op, "x", x, ("R", "K"))
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{op}: x: no gradient flows through FP8 rows, but it requires one; pass "
                "x.detach() or call under torch.no_grad()"
            )
        return cls(*fp8.fp8_rows(x.detach()))

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
