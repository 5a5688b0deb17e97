# SPDX-License-Identifier: MIT
"""Memory for rows, used again: the pages of new memory cost as much as writing them twice."""

import ctypes
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

_LEAST = 1 << 20  # bytes; the allocator keeps smaller ones itself
_HUGE = 2 << 20
_KEPT = 4  # blocks that nobody uses


class Blocks:
    """Gives tensors; the memory of one that is gone is given again."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns], unset."""
        size = rows * columns * dtype.itemsize
        if size < _LEAST:
            return torch.empty(rows, columns, dtype=dtype)
        block = self._taken(size)
        # what the tensor's storage holds: it goes with the last tensor on this memory
        held = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(held, self._give_back, block).atexit = False
        return torch.frombuffer(held, dtype=dtype).view(rows, columns)

    def _taken(self, size: int) -> mmap.mmap:
        free, self._free = self._free, []
        fit = min((b for b in free if size <= len(b) <= 2 * size), key=len, default=None)
        self._free += [block for block in free if block is not fit]
        if fit is None:
            fit = mmap.mmap(-1, -(-(size + size // 8) // _HUGE) * _HUGE, flags=mmap.MAP_PRIVATE)
            with suppress(OSError):  # a kernel without huge pages
                fit.madvise(mmap.MADV_HUGEPAGE)
        return fit

    def _give_back(self, block: mmap.mmap) -> None:
        self._free = [*self._free, block][-_KEPT:]
