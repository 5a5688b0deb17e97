# SPDX-License-Identifier: MIT
"""What operators do to tensors before a kernel sees them."""

from typing import Final

import torch
from torch import Tensor

from kimi_ops import _native

HUGE_PAGES_FROM: Final = 8 << 20  # bytes; smaller tensors are reused by the allocator


def dense_rows(x: Tensor) -> Tensor:
    """x [R, C] with elements of a row side by side; the row stride stays free."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def with_a_unit_stride(x: Tensor) -> Tensor:
    """x, or a copy where neither rows nor columns lie side by side (an expanded gradient)."""
    return x if 1 in x.stride() or x.numel() < 2 else x.contiguous()


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of an enclosing `torch.autocast`, which leaves float64 alone; else x."""
    kind = x.device.type
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return x
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, whose fresh memory the kernel may fill by 2 MiB pages: 512 times fewer faults."""
    if tensor.nbytes >= HUGE_PAGES_FROM and tensor.device.type == "cpu":
        _native._C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def workspace(op: str, like: Tensor, *sizes: int) -> Tensor:
    _native.share_threads()
    size = _native.workspace_bytes(op, like, *sizes)
    return huge_pages(like.new_empty((size,), dtype=torch.uint8))
