# SPDX-License-Identifier: MIT
"""Whether there is a GPU that works, and the choice of a program's device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kimi_ops import _native
from kimi_ops.moe.topk_gate import topk_gate

DEVICES = ("auto", "cpu", "cuda")


class DeviceError(RuntimeError):
    """The device that was asked for cannot be used; the message says why and how to mend it."""


@dataclass(frozen=True)
class Fault:
    """Why no GPU can be used.

    Attributes
    ----------
    present : bool
        There is one, as far as can be told.
    reason, mend : str
        Parts of a sentence.
    """

    present: bool
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.mend}"


# What a message holds, and what it means.
_FAULTS = (
    (
        ("not compiled with CUDA",),
        Fault(False, "this torch is a build without CUDA", "install one with CUDA"),
    ),
    (
        ("no NVIDIA driver",),
        Fault(False, "there is no NVIDIA driver", "install one if there is a GPU"),
    ),
    (
        ("No CUDA GPUs",),
        Fault(False, "no GPU is visible", "look at nvidia-smi and at CUDA_VISIBLE_DEVICES"),
    ),
    (
        ("has no CUDA kernels",),
        Fault(
            True,
            "this build of kimi_ops has no CUDA kernels",
            "rebuild it with nvcc on the PATH and KIMI_OPS_CUDA=on",
        ),
    ),
    (
        ("driver on your system is too old", "driver version is insufficient"),
        Fault(
            True,
            "the NVIDIA driver is older than this torch needs",
            "update it, or install a torch for an older CUDA",
        ),
    ),
    (
        ("out of memory",),
        Fault(
            True,
            "the GPU's memory is full",
            "end what fills it (nvidia-smi shows it), or name another GPU in CUDA_VISIBLE_DEVICES",
        ),
    ),
    (
        ("no kernel image",),
        Fault(
            True,
            "torch or kimi_ops has no kernels for this GPU's architecture",
            "build both for it; kimi_ops serves compute capability 8.0 and later",
        ),
    ),
)


def gpu_fault() -> Fault | None:
    """Why the current GPU cannot be used; None where it works.

    It works when a tensor fits into its memory and a kernel of this library gives the right result
    on it: a driver that is too old, a full memory, an architecture without kernels or a build
    without any are all found here and not in the middle of a run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an old driver or GPU: told in one sentence
            _try_gpu()
    except Exception as error:  # of torch, the driver or a kernel, in whatever form
        message = str(error) or type(error).__name__
        for parts, fault in _FAULTS:
            if any(part in message for part in parts):
                return fault
        return Fault(True, message.splitlines()[0], "mend that, or compute on the CPU")
    return None


def _try_gpu(device: str = "cuda") -> None:
    torch.cuda.init()  # raises with the reason, of which torch.cuda.is_available() makes False
    if not _native._C.cuda_architectures():
        raise RuntimeError("this build has no CUDA kernels")
    logits = (
        torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float32, device=device) + 0
    )  # a kernel of torch
    chosen = topk_gate(logits, 2).indices.tolist()
    if chosen != [[1, 2]]:
        raise RuntimeError(f"a kernel gave the wrong result, {chosen} for [[1, 2]]")


def choose_device(wanted: str, program: str, tell: Callable[[str], None]) -> torch.device:
    """The device for ``--device auto``, ``cpu`` or ``cuda``.

    ``auto`` is the current GPU if it works, else the CPU; `tell` hears of a GPU that is there and
    does not.

    Raises
    ------
    DeviceError
        ``cuda``, and no GPU works.
    ValueError
        Another name.
    """
    if wanted not in DEVICES:
        raise ValueError(
            f"{program}: --device: expected auto, cpu or cuda, got {wanted}; choose one (which GPU "
            "is a matter of CUDA_VISIBLE_DEVICES)"
        )
    if wanted == "cpu":
        return torch.device("cpu")
    fault = gpu_fault()
    if fault is None:
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "cuda":
        raise DeviceError(f"{program}: --device: expected a GPU that works, got none: {fault}")
    if fault.present:
        tell(f"{program}: on the CPU, because {fault}")
    return torch.device("cpu")
