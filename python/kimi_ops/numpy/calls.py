# SPDX-License-Identifier: MIT
"""Calls of native functions on arrays, whoever's and wherever they are."""

from contextlib import nullcontext
from typing import Any

import numpy as np

from kimi_ops._library import _C
from kimi_ops.arrays.door import namespace
from kimi_ops.numpy.arrays import Array, as_numpy
from kimi_ops.numpy.gpu import GpuArray, Place, library, on_gpu


def space_of(x: Any) -> Any:
    """The namespace of an array that is not NumPy's, where it has one: results go there."""
    if isinstance(x, np.ndarray):
        return None
    return library(x) if on_gpu(x) else namespace(x)


def adopted(x: Any) -> Any:
    """An array of NumPy, or of a framework that has a namespace."""
    return x if space_of(x) else as_numpy(x)


def call(op: str, *arguments: Any) -> Any:
    """The native function on arrays, its results in the framework of the first."""
    first = next(filter(_is_array, _flat(arguments)), None)
    place = Place(first) if on_gpu(first) else None
    with place.current() if place else nullcontext():
        result = getattr(_C, op)(*(_in(argument, place) for argument in arguments))
        if result is NotImplemented:  # tensors have a twin in torch
            raise TypeError(
                f"{op}: expected arrays of float32, bfloat16 or float16, got float64; convert them"
            )
        return _out(result, None if first is None else space_of(first))


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, np.generic)


def _flat(arguments: Any) -> Any:
    for value in arguments:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _in(value: Any, place: Place | None) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_in(one, place) for one in value)
    if not _is_array(value):
        return value
    return GpuArray(value, place) if place and on_gpu(value) else Array(value)


def _out(value: Any, space: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_out(one, space) for one in value)
    return value.out(space) if isinstance(value, Array) else value
