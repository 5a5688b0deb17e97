# SPDX-License-Identifier: MIT
"""Timing, memory and the roofs of the machine, measured in the same run as what is compared."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Seconds of one call: median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> "Time":
        samples = sorted(samples)
        last = len(samples) - 1
        low, high = samples[round(0.1 * last)], samples[round(0.9 * last)]
        return cls(statistics.median(samples), low, high)


def measure(functions: dict[str, Function], device: str, quick: bool = False) -> dict[str, Time]:
    """Times all functions in turn, round after round, so that drift of the machine hits each.

    CPU: wall clock; short functions are repeated within a sample. CUDA: events around a call, with
    the L2 cache flushed before it.
    """
    warm = time.perf_counter()
    repeats = {name: _warm_up(function, device) for name, function in functions.items()}
    slow = time.perf_counter() - warm > 6.0
    samples: dict[str, list[float]] = {name: [] for name in functions}
    budget = (0.3 if quick else 1.5) * len(functions)
    start = time.perf_counter()
    least, most = (3, 20) if quick or slow else (7, 200)
    for rounds in range(most):
        if rounds >= least and time.perf_counter() - start > budget:
            break
        for name, function in functions.items():
            samples[name].append(_sample(function, repeats[name], device))
    return {name: Time.of(values) for name, values in samples.items()}


def _warm_up(function: Function, device: str) -> int:
    start = time.perf_counter()
    function()
    if device == "cpu" and time.perf_counter() - start > 0.5:
        return 1
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        return 1
    start = time.perf_counter()
    function()
    return max(1, int(1e-3 / max(time.perf_counter() - start, 1e-7)))


def _sample(function: Function, repeats: int, device: str) -> float:
    if device == "cuda":
        _flush_l2()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


_flush_buffer: torch.Tensor | None = None


def _flush_l2() -> None:
    global _flush_buffer
    if _flush_buffer is None:
        _flush_buffer = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    _flush_buffer.zero_()


def read_bandwidth(device: str) -> float:
    """Bytes a second that torch.sum reads from memory (512 MB of fp32)."""
    x = torch.ones(128 << 20, device=device)
    return x.numel() * 4 / measure({"sum": x.sum}, device, quick=True)["sum"].p10


def compute_peak(dtype: torch.dtype, device: str, size: int = 0) -> float:
    """FLOP a second of torch's best sample of a dense [size, size] @ [size, size]."""
    size = size or (8192 if device == "cuda" else 3072)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = measure({"mm": lambda: torch.mm(a, b, out=out)}, device, quick=True)
    return 2 * size**3 / times["mm"].p10


def roof_rate(flops: float, moved: float, peak: float, bandwidth: float) -> float:
    """FLOP a second at the binding roof: the work takes max(flops / peak, bytes / bandwidth)."""
    return flops / max(flops / peak, moved / bandwidth)


def peak_memory(function: Function, device: str) -> int:
    """Bytes that one call allocates at its peak, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    held = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
