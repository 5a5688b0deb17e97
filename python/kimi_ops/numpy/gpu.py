# SPDX-License-Identifier: MIT
"""Arrays on a GPU inside a call: CuPy's, or another library's that follows the array API.

Memory: outputs and workspaces come from the library's own `empty`. The native function lets go of a
workspace when its kernels are queued, before they have run. That is sound where freed memory goes
to nobody but later work on the same stream, as from CuPy's pools, which keep what was freed apart
by stream; where freeing waits for the device (cudaFree); or where it is queued on the stream
(cudaFreeAsync). A library whose `empty` gives freed memory to another stream at once has to make
that stream wait for this one.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np

from kimi_ops.arrays.door import namespace
from kimi_ops.numpy.arrays import NAMED, UNSIGNED, Array, bits, exported, kind, name_of_kind

CUDA = 2  # DLPack's number
LEGACY = 1  # its name of the default stream, which is also a cudaStream_t

_OTHERS = {"torch": "kimi_ops", "jax": "kimi_ops.jax", "jaxlib": "kimi_ops.jax"}

_given: ContextVar[int | None] = ContextVar("stream", default=None)


@contextmanager
def stream(handle: int) -> Iterator[None]:
    """Calls inside queue their kernels on the CUDA stream `handle`, a ``cudaStream_t`` as a number;
    0 and 1 are the legacy default stream, which is taken without this too, 2 that of the thread.

    For arrays of libraries other than CuPy, whose current stream is found by itself. The array's
    device is the current one, and the stream one of it.

    Raises
    ------
    TypeError, ValueError
        `handle` is no whole number, or a negative one. In a call: CuPy's current stream is another.

    Examples
    --------
    >>> import kimi_ops.numpy as kn
    >>> with kn.stream(1):
    ...     pass
    """
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise TypeError(
            f"stream: handle: expected a cudaStream_t as an int, got {type(handle).__name__}; pass "
            "its address"
        )
    if not 0 <= handle < 2**64:
        raise ValueError(f"stream: handle: expected 0..2^64 - 1, got {handle}; pass its address")
    before = _given.set(handle or LEGACY)
    try:
        yield
    finally:
        _given.reset(before)


def on_gpu(x: Any) -> bool:
    device = None if isinstance(x, np.ndarray) else getattr(x, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == CUDA


def library(x: Any) -> Any:
    """The namespace of an array on a GPU, whose `empty` gives memory there."""
    name = type(x).__module__.partition(".")[0]
    got = f"got {type(x).__module__}.{type(x).__qualname__} on a GPU"
    if name in _OTHERS:
        raise TypeError(
            f"kimi_ops.numpy: expected an array of CuPy, {got}; call the function of "
            f"{_OTHERS[name]}, which has its memory and its stream"
        )
    space = namespace(x)
    if not hasattr(space, "empty"):
        raise TypeError(
            "kimi_ops.numpy: expected an array of CuPy, or of a library whose "
            f"__array_namespace__() has `empty`, {got}; pass cupy.from_dlpack(x)"
        )
    return space


class Place:
    """What the arrays of one call share: the first one's library, device and stream."""

    def __init__(self, first: Any) -> None:
        self.library, self.device = library(first), first.device
        self.is_cupy = self.library is sys.modules.get("cupy")
        given = _given.get()
        self.stream = LEGACY if given is None else given
        if self.is_cupy:
            with self.current():  # each device has a current stream of its own
                self.stream = self.library.cuda.get_current_stream().ptr or LEGACY
            if given not in (None, self.stream):
                raise ValueError(
                    f"kimi_ops.numpy.stream: expected CuPy's current stream {self.stream:#x}, got "
                    f"{given:#x}; use it by `with cupy.cuda.ExternalStream(handle)`"
                )

    def current(self) -> AbstractContextManager[Any]:
        """The device is the current one."""
        return self.library.cuda.Device(self.device) if self.is_cupy else nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: tuple[int, int]) -> Any:
        """Unset memory, dense; what the library has no name for is a view of whole numbers."""
        space, there = self.library, {} if self.is_cupy else {"device": self.device}
        name = name_of_kind(dtype)
        if dtype in NAMED and not hasattr(space, name):
            return self.empty(shape, (UNSIGNED, dtype[1])).view(NAMED[dtype])
        return space.empty(shape, dtype=getattr(space, name, name), **there)


class GpuArray(Array):
    """An array on a GPU; the call asks the first one for its stream and for memory."""

    def __init__(self, held: Any, place: Place) -> None:
        super().__init__(held)
        self.place = place

    @property
    def stream(self) -> int:
        return self.place.stream

    def __dlpack__(self, **options: Any) -> Any:
        """The kernels' stream waits for whatever the library has queued on the array elsewhere."""
        return exported(self.held, stream=self.stream, **options)

    def empty(self, shape: tuple[int, ...], dtype: tuple[int, int]) -> "GpuArray":
        return GpuArray(self.place.empty(shape, dtype), self.place)

    @property
    def mT(self) -> "GpuArray":  # noqa: N802  (its name in the array API)
        return GpuArray(self.held.swapaxes(-1, -2), self.place)

    def contiguous(self) -> "GpuArray":
        copy = self.empty(self.held.shape, kind(self.held.dtype))
        copy.copy_(self)
        return copy

    def copy_(self, other: Array) -> None:
        bits(self.held)[...] = bits(other.held)

    def cpu(self) -> Array:
        """A copy for checks of what it holds (KIMI_OPS_CHECK=1), which wait for it."""
        held = self.held
        return Array(held.get() if self.place.is_cupy else np.from_dlpack(held, device="cpu"))

    def out(self, space: Any) -> Any:
        return self.held
