# SPDX-License-Identifier: MIT
"""The native module, the operator library, and the one way from a tensor op to a kernel."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
HUGE_PAGES_FROM: Final = 8 << 20  # bytes; smaller tensors are reused by the allocator

library = torch.library.Library("kimi_ops", "DEF")

# (module, kimi_device) that serves CPU tensors. Tests put the host-run CUDA kernels here.
cpu_engine: tuple[ModuleType, int] = (_C, CPU)


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded in this process, by file name (Linux)."""
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    return sorted(set(re.findall(r"/([^/\n]*lib(?:gomp|iomp5|omp)[^/\n]*\.so[^/\n]*)", text)))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, whose fresh memory the kernel may fill by 2 MiB pages: 512 times fewer faults."""
    if tensor.nbytes >= HUGE_PAGES_FROM and tensor.device.type == "cpu":
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


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


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Defines ``kimi_ops::<schema>`` for CPU and CUDA tensors and returns a callable.

    A functional op gets a twin ``<name>_forward`` without autograd, taken where no gradient can be
    asked for: that saves 5 us of autograd's Python a call. One without a `backward` refuses to be
    differentiated; so do all in forward mode.
    """
    name = schema[: schema.index("(")]
    op = define(schema, implementation, fake)
    if "(a!)" in schema:
        return op

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{name}: expected to be differentiated once at most, got a second derivative; "
            f"kimi_ops.reference is plain torch and has them all"
        )

    torch.library.register_autograd(
        f"kimi_ops::{name}", backward or refuse, setup_context=setup_context, lib=library
    )
    plain = define(f"{name}_forward{schema[len(name) :]}", implementation, fake)

    def dispatch(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_duals(name, arguments)
        wanted = torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        )
        return op(*arguments) if wanted else plain(*arguments)

    return dispatch


def _refuse_duals(op: str, arguments: tuple[Any, ...]) -> None:
    """Without a forward-mode formula torch would carry a zero tangent on in silence."""
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op}: expected reverse-mode differentiation, got a forward-mode tangent; "
            "kimi_ops.reference is plain torch and has both"
        )


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines ``kimi_ops::<schema>`` for CPU and CUDA tensors, without autograd."""
    name = schema[: schema.index("(")]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, implementation, key)
    torch.library.register_fake(f"kimi_ops::{name}", fake, lib=library)
    return getattr(torch.ops.kimi_ops, name).default
