# SPDX-License-Identifier: MIT
"""NumPy's arrays, and whatever else speaks DLPack on a CPU, on their way into native functions and
back. NumPy itself exports no bfloat16; its bits cross as whole numbers and are named here."""

import sys
from typing import Any

import numpy as np

from kimi_ops._library import _C
from kimi_ops.arrays.door import name_of

try:
    from ml_dtypes import bfloat16, float8_e4m3fn
except ImportError:  # then no array has these dtypes
    _KINDS: dict[np.dtype, int] = {}
else:
    _KINDS = {np.dtype(bfloat16): 4, np.dtype(float8_e4m3fn): 10}  # DLPack's codes of kinds
_UNSIGNED = 1
_NAMED = {(code, dtype.itemsize * 8): dtype for dtype, code in _KINDS.items()}
_TYPES = {
    "bool": (6, 8), "uint8": (1, 8), "int32": (0, 32), "int64": (0, 64), "float16": (2, 16),
    "bfloat16": (4, 16), "float32": (2, 32), "float64": (2, 64), "float8_e4m3fn": (10, 8),
}  # fmt: skip


class Array:
    """An array inside a call. What the call makes is like its first array: one of these."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __dlpack__(self, **options: Any) -> Any:
        if not isinstance(self.held, np.ndarray) or self.held.dtype not in _KINDS:
            return self.held.__dlpack__(**options)
        bits = self.held.view(f"u{self.held.itemsize}")
        return _C.retyped(bits.__dlpack__(**options), _KINDS[self.held.dtype])

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.held.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return sys.modules[__name__]

    @property
    def mT(self) -> "Array":  # noqa: N802  (its name in the array API)
        return Array(self.held.mT)

    def contiguous(self) -> "Array":
        return Array(np.ascontiguousarray(_as_numpy(self.held)))

    def copy_(self, other: "Array") -> None:
        np.copyto(_as_numpy(self.held), _as_numpy(other.held))


class _Bits:
    """Memory as whole numbers."""

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


def _as_numpy(x: Any) -> np.ndarray:
    """The same memory as an array of NumPy."""
    if isinstance(x, np.ndarray):
        return x
    dtype = _NAMED.get(kind(x.dtype))
    return np.from_dlpack(x) if dtype is None else np.from_dlpack(_Bits(x)).view(dtype)


def space_of(x: Any) -> Any:
    """The namespace of an array that is not NumPy's, where it has one: results go there."""
    if isinstance(x, np.ndarray) or not hasattr(x, "__array_namespace__"):
        return None
    return x.__array_namespace__()


def adopted(x: Any) -> Any:
    """An array of NumPy, or of a framework that has a namespace."""
    return x if space_of(x) else _as_numpy(x)


def call(op: str, *arguments: Any) -> Any:
    """The native function on arrays, its results in the framework of the first."""
    result = getattr(_C, op)(*map(_in, arguments))
    if result is NotImplemented:  # tensors have a twin in torch
        raise TypeError(
            f"{op}: expected arrays of float32, bfloat16 or float16, got float64; convert them"
        )
    first = next(filter(_is_array, _flat(arguments)))
    return _out(result, space_of(first))


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, np.generic)


def _flat(arguments: Any) -> Any:
    for value in arguments:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _in(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_in, value))
    return Array(value) if _is_array(value) else value


def _out(value: Any, space: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_out(one, space) for one in value)
    if not isinstance(value, Array):
        return value
    return value.held if space is None else space.from_dlpack(value)


def kind(dtype: Any) -> tuple[int, int]:
    """DLPack's (code, bits) of a dtype."""
    named = dtype if isinstance(dtype, str) or not isinstance(dtype, type) else np.dtype(dtype)
    return _TYPES.get(name_of(named), (255, 0))
