# SPDX-License-Identifier: MIT
"""The native module, and what it is told of torch: tensors enter it through DLPack."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from kimi_ops._library import _C

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels
# with CUDA kernels of their own
CUDA_OPS: Final = (
    "topk_gate", "balance", "permute", "grouped_gemm", "fused_experts", "newton_schulz", "qk_clip",
    "muon_clip",
)  # fmt: skip
GRADIENT: Final = 1  # ways of a call: see csrc/bindings/framework.h
WATCHED: Final = 2
OTHERWISE: Final = 3

TORCH: Final = (2, 11)  # the oldest with __dlpack_c_exchange_api__ as csrc/bindings/dlpack.h has it


def check_version(version: str) -> None:
    """Refuse a torch that is too old, before it lacks a name somewhere."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) < TORCH:
        oldest = ".".join(map(str, TORCH))
        raise ImportError(
            f"kimi_ops: torch: expected {oldest} or later, got {version} from {torch.__file__}; "
            f"pip install -U 'torch>={oldest}'"
        )


check_version(torch.__version__)

# The module that serves tensors. Tests put the host-run CUDA kernels here.
engine: ModuleType = _C


def _torch_functions() -> dict[str, Any]:
    """What csrc/bindings/framework.h asks of torch; a name that this torch lacks is a defect."""
    functions = torch._C
    found = {
        "dispatch_modes": functions._len_torch_dispatch_stack,
        "function_modes": functions._len_torch_function_stack,
        "function_mode_at": functions._get_function_stack_at,
        "device_mode": DeviceContext,
        "functorch": functions._functorch.peek_interpreter_stack,
        "tracing": functions._get_tracing_state,
        "grad_enabled": torch.is_grad_enabled,
        "num_threads": torch.get_num_threads,
        "increment_version": torch.autograd.graph.increment_version,
        "out_of_memory": torch.OutOfMemoryError,
        "dual_levels": vars(forward_ad),
        "dtypes": _dlpack_types(),
    }
    if hasattr(functions, "_cuda_getDevice"):  # a torch with CUDA
        found["current_device"] = functions._cuda_getDevice
        found["exchange_device"] = functions._cuda_exchangeDevice
    return found


def _dlpack_types() -> dict[torch.dtype, tuple[int, int]]:
    """(code, bits) of every dtype that DLPack and this torch know."""
    codes = {
        "int8": 0, "int16": 0, "int32": 0, "int64": 0, "uint8": 1, "uint16": 1, "uint32": 1,
        "uint64": 1, "float16": 2, "float32": 2, "float64": 2, "bfloat16": 4, "complex64": 5,
        "complex128": 5, "bool": 6, "float8_e4m3fn": 10, "float8_e4m3fnuz": 11, "float8_e5m2": 12,
        "float8_e5m2fnuz": 13, "float8_e8m0fnu": 14,
    }  # fmt: skip
    types = {getattr(torch, name): code for name, code in codes.items() if hasattr(torch, name)}
    return {dtype: (code, dtype.itemsize * 8) for dtype, code in types.items()}


def use(module: ModuleType) -> ModuleType:
    """`module` with torch's functions."""
    module.bind_torch(torch.Tensor, torch.nn.Parameter, _torch_functions())
    return module


use(_C)


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded in this process, by file name (Linux)."""
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    return sorted(set(re.findall(r"/([^/\n]*lib(?:gomp|iomp5|omp)[^/\n]*\.so[^/\n]*)", text)))
