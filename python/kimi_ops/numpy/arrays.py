# SPDX-License-Identifier: MIT
"""NumPy's arrays, and whatever else speaks DLPack on a CPU, on their way into native functions and
back. NumPy itself exports no bfloat16; its bits cross as whole numbers and are named here."""

import sys
from typing import Any

import numpy as np

from kimi_ops._library import _C

try:
    from ml_dtypes import bfloat16, float8_e4m3fn
except ImportError:  # then no array has these dtypes
    _KINDS: dict[np.dtype, int] = {}
else:
    _KINDS = {np.dtype(bfloat16): 4, np.dtype(float8_e4m3fn): 10}  # DLPack's codes of kinds
_UNSIGNED = 1
_NAMED = {(code, dtype.itemsize * 8): dtype for dtype, code in _KINDS.items()}
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


class Array:
    """An array inside a call. What the call makes is like its first array: one of these."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __dlpack__(self, **options: Any) -> Any:
        if not isinstance(self.held, np.ndarray) or self.held.dtype not in _KINDS:
            return self.held.__dlpack__(**options)
        bits = self.held.view(f"u{self.held.itemsize}")
        return _C.retyped(bits.__dlpack__(**options), _KINDS[self.held.dtype])

    def __array_namespace__(self) -> Any:
        return sys.modules[__name__]

    @property
    def mT(self) -> "Array":  # noqa: N802  (its name in the array API)
        return Array(self.held.mT)

    def contiguous(self) -> "Array":
        return Array(np.ascontiguousarray(_as_numpy(self)))

    def copy_(self, other: "Array") -> None:
        np.copyto(self.held, _as_numpy(other))


class _Bits:
    """Memory of the native module as whole numbers."""

    def __init__(self, exported: Any) -> None:
        self.exported = exported

    def __dlpack__(self, **options: Any) -> Any:
        return _C.retyped(self.exported.__dlpack__(**options), _UNSIGNED)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.exported.__dlpack_device__()


def from_dlpack(exported: Any) -> Array:
    """What the native module calls for each result."""
    dtype = _NAMED.get(exported.dtype)
    if dtype is None:  # NumPy's own, or refused by NumPy
        return Array(np.from_dlpack(exported))
    return Array(np.from_dlpack(_Bits(exported)).view(dtype))


def _as_numpy(array: Array) -> np.ndarray:
    held = array.held
    return held if isinstance(held, np.ndarray) else np.from_dlpack(held)


def call(op: str, *arguments: Any) -> Any:
    """The native function on arrays, its results as NumPy's."""
    return _out(getattr(_C, op)(*map(_in, arguments)))


def _in(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_in, value))
    held = hasattr(value, "__dlpack__") and not isinstance(value, np.generic)
    return Array(value) if held else value


def _out(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_out, value))
    return value.held if isinstance(value, Array) else value


def kind(dtype: Any) -> tuple[int, int]:
    """DLPack's (code, bits) of a dtype."""
    dtype = np.dtype(dtype)
    return _KINDS.get(dtype, _CODES.get(dtype.kind, 255)), dtype.itemsize * 8


def dtype_of(array: Any) -> np.dtype:
    """The dtype of an array, whoever's it is."""
    return np.dtype(str(array.dtype).removeprefix("torch."))


def ids(array: Any) -> Any:
    """Ids of experts as the kernels take them: int32."""
    return _converted(array, np.int32) if str(array.dtype).endswith("int64") else array


def as_weights(array: Any) -> Any:
    """Weights of experts as the kernels take them: float32."""
    return _converted(array, np.float32) if dtype_of(array).itemsize == 2 else array


def _converted(array: Any, dtype: Any) -> np.ndarray:
    return _as_numpy(Array(array)).astype(dtype)
