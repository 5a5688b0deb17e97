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
UNSIGNED = 1
NAMED = {(code, dtype.itemsize * 8): dtype for dtype, code in _KINDS.items()}
_SIZES = {"int": (0, 8, 16, 32, 64), "uint": (UNSIGNED, 8, 16, 32, 64), "float": (2, 16, 32, 64),
          "complex": (5, 64, 128), "bfloat": (4, 16)}  # fmt: skip
_TYPES = {"bool": (6, 8), "float8_e4m3fn": (10, 8)} | {
    f"{name}{size}": (code, size) for name, (code, *sizes) in _SIZES.items() for size in sizes
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


class Array:
    """An array inside a call. What the call makes is like its first array: one of these."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __dlpack__(self, **options: Any) -> Any:
        numpy = isinstance(self.held, np.ndarray)
        return exported(self.held, **options) if numpy else self.held.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.held.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return sys.modules[__name__]

    @property
    def mT(self) -> "Array":  # noqa: N802  (its name in the array API)
        return Array(self.held.mT)

    def contiguous(self) -> "Array":
        return Array(np.ascontiguousarray(as_numpy(self.held)))

    def copy_(self, other: "Array") -> None:
        np.copyto(as_numpy(self.held), as_numpy(other.held))

    def out(self, space: Any) -> Any:
        """A result, in a library's namespace."""
        return self.held if space is None else space.from_dlpack(self)


def exported(x: Any, **options: Any) -> Any:
    """The capsule of an array."""
    code = _KINDS.get(x.dtype)
    capsule = bits(x).__dlpack__(**options)
    return capsule if code is None else _C.retyped(capsule, code)


def bits(x: Any) -> Any:
    """The same memory; as whole numbers where DLPack's producer may not know the dtype."""
    return x.view(f"u{x.dtype.itemsize}") if x.dtype in _KINDS else x


class _Bits:
    """Memory as whole numbers."""

    def __init__(self, exported: Any) -> None:
        self.exported = exported

    def __dlpack__(self, **options: Any) -> Any:
        return _C.retyped(self.exported.__dlpack__(**options), UNSIGNED)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.exported.__dlpack_device__()


def from_dlpack(exported: Any) -> Array:
    """What the native module calls for each result."""
    dtype = NAMED.get(exported.dtype)
    if dtype is None:  # NumPy's own, or refused by NumPy
        return Array(np.from_dlpack(exported))
    return Array(np.from_dlpack(_Bits(exported)).view(dtype))


def as_numpy(x: Any) -> np.ndarray:
    """The same memory as an array of NumPy."""
    if isinstance(x, np.ndarray):
        return x
    dtype = NAMED.get(kind(x.dtype))
    return np.from_dlpack(x) if dtype is None else np.from_dlpack(_Bits(x)).view(dtype)


def kind(dtype: Any) -> tuple[int, int]:
    """DLPack's (code, bits) of a dtype."""
    named = dtype if isinstance(dtype, str) or not isinstance(dtype, type) else np.dtype(dtype)
    return _TYPES.get(name_of(named), (255, 0))


def name_of_kind(kind: tuple[int, int]) -> str:
    return _NAMES[kind]
