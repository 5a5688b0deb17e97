# SPDX-License-Identifier: MIT
"""What ops do inside of `torch.autocast`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_CAST = (torch.bfloat16, torch.float16, torch.float32)  # float64 is left alone


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """An enclosing `torch.autocast` ends here; without one, nothing (meta knows none)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def no_cast_kept() -> Iterator[None]:
    """An enclosing `torch.autocast` casts a weight wherever it is used: no two uses share a cast,
    in which their gradients would be added up in 16 bits."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype of the enclosing `torch.autocast` of the first one's device; without
    one, as they are. float64, integers and what is no tensor are left alone."""
    if not torch.compiler.is_dynamo_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors  # by one call: it is made for every product
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _CAST else x for x in tensors)
