# SPDX-License-Identifier: MIT
"""Stored forms on arrays: weights in FP8 blocks and INT4 groups, rows in FP8, as `kimi_ops.formats`
says. A form is a tuple of arrays, so that JAX takes it as an argument of a program."""

from typing import Any, NamedTuple

import numpy as np

from kimi_ops.arrays.door import namespace

FP8_BLOCK = 128
FP8_MAX = 448.0
INT4_GROUP = 32
INT4_WORD = 8
INT4_MAX = 7
SMALLEST = np.float32(2.0**-126)


class Fp8BlockWeight(NamedTuple):
    """Weights [E, N, K] in FP8: ``W = data * scale``, a scale for 128 x 128 values.

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> kn.Fp8BlockWeight.quantize(np.ones((2, 300, 200), np.float32)).scale.shape
    (2, 3, 2)
    """

    data: Any  # [E, N, K] float8_e4m3fn
    scale: Any  # [E, ceil(N / 128), ceil(K / 128)] float32

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, N, K]."""
        return tuple(self.data.shape)

    @classmethod
    def quantize(cls, weight: Any) -> "Fp8BlockWeight":
        """The nearest values to weight [E, N, K] of floats, which are finite."""
        xp, (_, rows, columns) = namespace(weight) or np, _stack(cls, weight)
        blocks = _blocks(xp, _blocks(xp, weight.astype("float32"), 2, FP8_BLOCK), 1, FP8_BLOCK)
        scale = _scale(xp, xp.abs(blocks).max((2, 4)), FP8_MAX)
        experts, across, _, along, _ = blocks.shape
        values = (blocks / scale[:, :, None, :, None]).reshape(
            experts, across * FP8_BLOCK, along * FP8_BLOCK
        )
        return cls(values[:, :rows, :columns].astype(named("float8_e4m3fn")), scale)

    def dequantize(self, dtype: Any = "float32") -> Any:
        """[E, N, K] in `dtype`: data * scale in float32, rounded once."""
        _, rows, columns = self.shape
        scale = self.scale.repeat(FP8_BLOCK, 1)[:, :rows].repeat(FP8_BLOCK, 2)[:, :, :columns]
        return (self.data.astype("float32") * scale).astype(dtype)


class Int4GroupWeight(NamedTuple):
    """Weights [E, N, K] in INT4: ``W = (nibble - 8) * scale``, a scale for 32 neighbours along K.

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> w = kn.Int4GroupWeight.quantize(np.array([[[7, -7, 1, 0, 2, 3, 4, 5]]], np.float32))
    >>> hex(w.packed.item() & 0xFFFFFFFF)
    '0xdcba891f'
    """

    packed: Any  # [E, N, K / 8] int32, the first nibble in the lowest bits
    scale: Any  # [E, N, ceil(K / 32)] bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, N, K]."""
        return (*self.packed.shape[:2], INT4_WORD * self.packed.shape[2])

    @classmethod
    def quantize(cls, weight: Any) -> "Int4GroupWeight":
        """The nearest values to weight [E, N, K] of floats, which are finite; 8 divides K."""
        xp, (experts, rows, columns) = namespace(weight) or np, _stack(cls, weight)
        if columns % INT4_WORD:
            raise ValueError(
                f"{cls.__name__}.quantize: weight: expected K, the last size, as a multiple of 8 "
                f"nibbles a word, got {columns}; pad it with zeros"
            )
        groups = _blocks(xp, weight.astype("float32"), 2, INT4_GROUP)
        scale = _scale(xp, xp.abs(groups).max(3), INT4_MAX).astype(named("bfloat16"))
        values = xp.clip(xp.round(groups / scale.astype("float32")[..., None]), -INT4_MAX, INT4_MAX)
        nibbles = (values.astype("int32") + 8).reshape(experts, rows, _padded(columns, INT4_GROUP))
        words = nibbles[:, :, :columns].reshape(experts, rows, columns // INT4_WORD, INT4_WORD)
        shifts = xp.arange(0, 4 * INT4_WORD, 4, dtype="int32")
        return cls((words << shifts).sum(3, dtype="int32"), scale)

    def dequantize(self, dtype: Any = "float32") -> Any:
        """[E, N, K] in `dtype`: (nibble - 8) * scale in float32, rounded once."""
        xp, (experts, rows, columns) = namespace(self.packed) or np, self.shape
        shifts = xp.arange(0, 4 * INT4_WORD, 4, dtype="int32")
        values = ((self.packed[..., None] >> shifts) & 15).reshape(experts, rows, columns) - 8
        scale = self.scale.astype("float32").repeat(INT4_GROUP, 2)[:, :, :columns]
        return (values.astype("float32") * scale).astype(dtype)


class Fp8Rows(NamedTuple):
    """Rows [R, K] in FP8: ``x = data * scale``, a scale for 128 columns of a row. For
    `grouped_gemm` with a `Fp8BlockWeight`; no gradients.

    Examples
    --------
    >>> import numpy as np
    >>> import kimi_ops.numpy as kn
    >>> kn.Fp8Rows.quantize(np.ones((5, 200), np.float32)).scale.shape
    (5, 2)
    """

    data: Any  # [R, K] float8_e4m3fn
    scale: Any  # [R, ceil(K / 128)] float32

    @property
    def shape(self) -> tuple[int, ...]:
        """[R, K]."""
        return tuple(self.data.shape)

    @classmethod
    def quantize(cls, x: Any) -> "Fp8Rows":
        """The nearest values to rows x [R, K] of floats."""
        xp, (rows, columns) = namespace(x) or np, x.shape
        blocks = _blocks(xp, x.astype("float32"), 1, FP8_BLOCK)
        scale = _scale(xp, xp.abs(blocks).max(2), FP8_MAX)
        values = (blocks / scale[..., None]).reshape(rows, _padded(columns, FP8_BLOCK))[:, :columns]
        return cls(values.astype(named("float8_e4m3fn")), scale)

    def dequantize(self, dtype: Any = "float32") -> Any:
        """[R, K] in `dtype`: data * scale in float32, rounded once."""
        scale = self.scale.repeat(FP8_BLOCK, 1)[:, : self.shape[1]]
        return (self.data.astype("float32") * scale).astype(dtype)


Quantized = (Fp8BlockWeight, Int4GroupWeight)


def parts(weight: Any) -> tuple[Any, Any]:
    """A weight as it is stored, and the scale of a quantised one."""
    return tuple(weight) if isinstance(weight, Quantized) else (weight, None)


def _scale(xp: Any, largest: Any, most: float) -> Any:
    """largest / most, rounded once: by a constant XLA would multiply with its reciprocal."""
    divisor = xp.where(largest >= 0, np.float32(most), np.float32(1))
    return xp.maximum(largest / divisor, SMALLEST)


def _padded(size: int, block: int) -> int:
    return size + -size % block


def _blocks(xp: Any, x: Any, axis: int, size: int) -> Any:
    """`x` with an axis of n in blocks, padded with zeros: two axes [ceil(n / size), size]."""
    sizes = [(0, -length % size if i == axis else 0) for i, length in enumerate(x.shape)]
    padded = xp.pad(x, sizes)
    length = padded.shape[axis] // size
    return padded.reshape(*x.shape[:axis], length, size, *x.shape[axis + 1 :])


def _stack(form: type, weight: Any) -> tuple[int, int, int]:
    if len(weight.shape) != 3:
        raise ValueError(
            f"{form.__name__}.quantize: weight: expected shape [E, N, K], got "
            f"{list(weight.shape)}; stack the experts' matrices"
        )
    return tuple(weight.shape)


def named(name: str) -> Any:
    """A dtype by its name; bfloat16 and FP8 are those of ml_dtypes."""
    if name not in ("bfloat16", "float8_e4m3fn"):
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))
