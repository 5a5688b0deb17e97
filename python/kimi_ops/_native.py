# SPDX-License-Identifier: MIT
"""The native module, and the one way from a tensor op to a kernel."""

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

try:
    from kimi_ops import _C
except ImportError as error:
    raise ImportError(
        f"kimi_ops: native module kimi_ops._C: expected beside {__file__}, could not be loaded "
        f"({error}); build it with `pip install .` (or `python setup.py build_ext --inplace` in "
        "the source tree) using this Python"
    ) from error

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kimi_dtype
CPU: Final = 0  # kimi_device
CUDA: Final = 1

# (module, kimi_device) that serves CPU tensors. Tests put the host-run CUDA kernels here.
cpu_engine: tuple[ModuleType, int] = (_C, CPU)


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded in this process, by file name (Linux)."""
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    return sorted(set(re.findall(r"/([^/\n]*lib(?:gomp|iomp5|omp)[^/\n]*\.so[^/\n]*)", text)))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def workspace_bytes(op: str, like: Tensor, *arguments: int) -> int:
    """What ``kimi_<op>_workspace_bytes`` says for the device of `like`."""
    module, code = (_C, CUDA) if like.is_cuda else cpu_engine
    return getattr(module, f"{op}_workspace_bytes")(*arguments, code)


def call(op: str, like: Tensor, *arguments: Any) -> None:
    """Runs a native op on the device of `like`, on its current stream."""
    if like.is_cuda:
        with torch.cuda.device(like.device):
            stream = torch.cuda.current_stream(like.device).cuda_stream
            getattr(_C, op)(*arguments, CUDA, stream)
        return
    module, code = cpu_engine
    share_threads()
    getattr(module, op)(*arguments, code, 0)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """An enclosing `torch.autocast` ends here; without one, nothing (meta knows none)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def share_threads() -> None:
    """OpenMP's own number is per thread and per runtime; torch's is the one that the user sets."""
    cpu_engine[0].set_num_threads(torch.get_num_threads())
