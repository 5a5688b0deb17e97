# SPDX-License-Identifier: MIT
"""A library of arrays on a GPU that is not there: their memory is the host's, everything else is as
CuPy has it. They refuse NumPy's arrays beside them, and to become some."""

import ctypes
import math
from typing import Any

import numpy as np

_POINTER = ctypes.pythonapi.PyCapsule_GetPointer
_POINTER.restype, _POINTER.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class Device:
    """An array. `streams` are those that somebody asked to wait for."""

    streams: list[int | None] = []
    place = (2, 0)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        Device.streams.append(stream)
        capsule = self.held.__dlpack__()
        tensor = _POINTER(capsule, b"dltensor")
        (ctypes.c_int32 * 2).from_address(tensor + 8)[:] = self.place  # behind the pointer
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place

    def __array_namespace__(self) -> Any:
        return LIBRARY

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("expected to stay on the GPU")

    device = property(lambda self: self.place)
    flags = property(lambda self: self.held.flags)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.held, name)
        return _called(value) if callable(value) else _there(value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held[_here(key)] = _here(value)

    def __iter__(self) -> Any:
        return map(_there, self.held)

    def __len__(self) -> int:
        return len(self.held)


def _here(value: Any) -> Any:
    """What lies behind arrays; those of NumPy are elsewhere."""
    if isinstance(value, Device):
        return value.held
    if isinstance(value, np.ndarray):
        raise TypeError("unsupported type numpy.ndarray")
    if isinstance(value, (list, tuple)):
        return type(value)(_here(one) for one in value)
    return value


def _there(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return Device(np.asarray(value))
    if isinstance(value, (list, tuple)) and any(isinstance(one, np.ndarray) for one in value):
        return type(value)(map(_there, value))
    return value


def _called(function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        return _there(function(*_here(arguments), **{k: _here(v) for k, v in options.items()}))

    return call


def _operator(name: str) -> Any:
    return lambda self, *others: _called(getattr(self.held, name))(*others)


_OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "pow",
    "lshift", "rshift", "and", "or", "lt", "le", "gt", "ge", "eq", "ne", "neg", "matmul", "getitem",
)  # fmt: skip
for _name in _OPERATORS:
    setattr(Device, f"__{_name}__", _operator(f"__{_name}__"))
Device.__hash__ = object.__hash__  # type: ignore[method-assign]


class Library:
    """The functions of NumPy, on the device."""

    made: list[str] = []  # dtypes of the memory that was asked for

    def empty(self, shape: Any, *, dtype: Any, device: Any) -> Device:
        assert device == Device.place
        Library.made.append(np.dtype(dtype).name)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.full(size + 64, 77, np.uint8)  # what nobody has written
        start = -memory.ctypes.data % 64
        return Device(memory[start : start + size].view(dtype).reshape(shape))

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        return value if isinstance(value, type) or not callable(value) else _called(value)


LIBRARY = Library()
