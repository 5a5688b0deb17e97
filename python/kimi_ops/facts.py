# SPDX-License-Identifier: MIT
"""What this installation is made of and which engine serves each op."""

import os
import platform
from typing import Any

import torch

from kimi_ops import _native
from kimi_ops._native import CUDA_OPS
from kimi_ops.gpu import Fault, gpu_fault
from kimi_ops.invariance import is_batch_invariant

OPS = (
    "topk_gate", "balance", "permute", "grouped_gemm", "fused_experts", "newton_schulz", "qk_clip",
    "muon_clip",
)  # fmt: skip


def info() -> dict[str, Any]:
    """Versions, instruction sets, architectures, threads and the engine of every op.

    Returns
    -------
    dict
        ``version``, ``python``, ``torch``; ``cpu`` (``isa`` in use, ``detected``, ``threads``,
        ``openmp`` runtimes and whether torch's is ``shared``, ``batch_invariant``); ``cuda``
        (``built`` architectures, ``device`` or the reason for none, what serves ``fp8`` rows
        there); ``engines``: op -> engine of CPU and of CUDA tensors.

    Examples
    --------
    >>> import kimi_ops
    >>> sorted(kimi_ops.info()["engines"])[:3]
    ['balance', 'fused_experts', 'grouped_gemm']
    """
    native = _native._C
    runtimes = _native.openmp_runtimes()
    isa, built = native.current_isa(), native.cuda_architectures()
    fault = gpu_fault()
    return {
        "version": native.version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": {
            "processor": _processor(),
            "isa": isa,
            "detected": native.detected_isa(),
            "forced": isa if os.environ.get("KIMI_OPS_ISA") == isa else None,
            "threads": torch.get_num_threads(),
            "openmp": runtimes,
            "shared": len(runtimes) == 1,
            "batch_invariant": is_batch_invariant(),
        },
        "cuda": {"built": built, "device": _gpu(fault), "fp8": _fp8(fault)},
        "engines": _engines(),
    }


def _engines() -> dict[str, dict[str, str]]:
    native = _native._C
    built = native.cuda_architectures()
    cuda = f"cuda ({built})" if built else "none in this build"
    engines = {}
    for op in OPS:
        engine = native.cpu_engine(op)  # None: no kernels yet, kimi_ops.reference serves it
        reference = "reference (torch)"
        engines[op] = {"cpu": engine or reference, "cuda": cuda if op in CUDA_OPS else reference}
    return engines


def engines_line(device: str) -> str:
    """Which engine serves which ops on ``cpu`` or ``cuda``, on one line."""
    served: dict[str, list[str]] = {}
    for op, engine in _engines().items():
        served.setdefault(engine[device], []).append(op)
    return "engines " + "; ".join(f"{name}: {', '.join(ops)}" for name, ops in served.items())


def describe() -> str:
    """:func:`info` as aligned text, for people and bug reports."""
    facts = info()
    cpu, cuda = facts["cpu"], facts["cuda"]
    openmp = ", ".join(cpu["openmp"]) or "none"
    forced = f", forced by KIMI_OPS_ISA={cpu['forced']}" if cpu["forced"] else ""
    lines = [
        f"kimi_ops  {facts['version']}",
        f"python    {facts['python']}, torch {facts['torch']}",
        f"cpu       {cpu['processor']}",
        f"isa       {cpu['isa']} (this machine offers {cpu['detected']}{forced})",
        f"threads   {cpu['threads']}, OpenMP {openmp} "
        + (
            "(shared with torch)" if cpu["shared"] else "(not shared with torch: told at each call)"
        ),
        *["rows      the same bits in any batch"] * cpu["batch_invariant"],
        f"cuda      built for {cuda['built'] or 'nothing (no nvcc, or KIMI_OPS_CUDA=off)'}",
        f"gpu       {cuda['device']}",
        f"fp8 rows  {cuda['fp8']}",
        "engines",
    ]
    lines += [
        f"  {op:<14} cpu: {engine['cpu']:<20} cuda: {engine['cuda']}"
        for op, engine in facts["engines"].items()
    ]
    return "\n".join(lines)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _fp8(fault: Fault | None) -> str:
    """The way of a product of `Fp8Rows` on the current GPU."""
    if fault is not None:
        return "none"
    if _native._C.cuda_serves_fp8():
        return "cuda (sm_90a)"
    return "dequantised to bfloat16 at each call"


def _gpu(fault: Fault | None) -> str:
    if fault is not None:
        return f"none: {fault}"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"
