# SPDX-License-Identifier: MIT
"""Timing, memory and the roofs of the machine, measured in the same run as what is compared."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kimi_ops import release_kept_memory

Function = Callable[[], object]
Functions = dict[str, Function]


@dataclass(frozen=True)
class Time:
    """Seconds of one call: median and the 10th and 90th percentile; on a GPU the median clock of
    its multiprocessors right behind the calls."""

    median: float
    p10: float
    p90: float
    mhz: float | None = None

    @classmethod
    def of(cls, samples: list[float], clocks: list[float] | None = None) -> "Time":
        samples = sorted(samples)
        last = len(samples) - 1
        low, high = samples[round(0.1 * last)], samples[round(0.9 * last)]
        return cls(
            statistics.median(samples), low, high, statistics.median(clocks) if clocks else None
        )


def measure(functions: Functions, device: str, quick: bool = False) -> dict[str, Time]:
    """Times all functions in turn, round after round, so that drift of the machine hits each.

    CPU: wall clock; short functions are repeated within a sample. CUDA: see :class:`GpuSampler`.
    """
    sampler = GpuSampler() if device == "cuda" else CpuSampler()
    warm = time.perf_counter()
    known = {name: sampler.warm_up(function) for name, function in functions.items()}
    slow = time.perf_counter() - warm > 6.0
    samples: dict[str, list[float]] = {name: [] for name in functions}
    clocks: dict[str, list[float]] = {name: [] for name in functions}
    budget = (0.3 if quick else 1.5) * len(functions)
    start = time.perf_counter()
    least = 3 if quick or slow else 7
    most = max(least, sampler.most // 10 if quick or slow else sampler.most)
    for rounds in range(most):
        if rounds >= least and time.perf_counter() - start > budget:
            break
        for name, function in functions.items():
            seconds, mhz = sampler.sample(function, known[name])
            samples[name].append(seconds)
            clocks[name] += [mhz] if mhz else []
    return {name: Time.of(samples[name], clocks[name]) for name in functions}


class CpuSampler:
    most = 200

    def warm_up(self, function: Function) -> float:
        """How often the function is called for a sample of a millisecond or more."""
        start = time.perf_counter()
        function()
        if time.perf_counter() - start > 0.5:
            return 1
        function()
        start = time.perf_counter()
        function()
        return max(1, int(1e-3 / max(time.perf_counter() - start, 1e-7)))

    def sample(self, function: Function, repeats: float) -> tuple[float, float | None]:
        start = time.perf_counter()
        for _ in range(int(repeats)):
            function()
        return (time.perf_counter() - start) / repeats, None


class GpuSampler:
    """Events around one call, in this order on the stream:

        wait | read 256 MB | event | the call | event | wait | event

    The first wait is longer than the host takes to enqueue the rest, so that a slow host is not
    seen as a slow kernel. Reading, not writing, empties the L2: dirty lines would be written back
    inside the call. The second wait is a known number of cycles, which tells the clock.
    """

    most = 70
    CYCLES = 200_000  # about 0.1 ms
    LONGEST = 40_000_000  # of the first wait: what keeps the host longer is the host's own time

    def __init__(self) -> None:
        self.flush = torch.ones(64 << 20, device="cuda")

    def warm_up(self, function: Function) -> float:
        """Seconds for which a call keeps the host."""
        for _ in range(2):
            function()
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return taken

    def sample(self, function: Function, host: float) -> tuple[float, float | None]:
        begin, end, after = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        ahead = int((2 * host + 100e-6) * 2e9)  # cycles at the fastest clock
        torch.cuda._sleep(min(ahead, self.LONGEST))
        self.flush.sum()
        begin.record()
        function()
        end.record()
        torch.cuda._sleep(self.CYCLES)
        after.record()
        after.synchronize()
        return begin.elapsed_time(end) * 1e-3, self.CYCLES / end.elapsed_time(after) * 1e-3


def graphed(function: Function, device: str) -> Function:
    """On a GPU the replay of a graph of the call, which leaves the host out; elsewhere the call."""
    if device != "cuda":
        return function
    function()  # what is done once is not captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def read_bandwidth(device: str) -> float:
    """Bytes a second that torch.sum reads from memory (512 MB of fp32)."""
    x = torch.ones(128 << 20, device=device)
    return x.numel() * 4 / measure({"sum": x.sum}, device, quick=True)["sum"].p10


def compute_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP a second of torch's best sample of a large dense product."""
    size = 8192 if device == "cuda" else 3072
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
    sizes, _ = _allocations(function)
    return max(itertools.accumulate(sizes, initial=0))


def kept_memory(function: Function, device: str) -> int:
    """Bytes that a call leaves behind while its result lives: of a forward, its graph's too."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        del result
        return kept
    sizes, result = _allocations(function)
    del result
    return sum(sizes)


def _allocations(function: Function) -> tuple[list[int], object]:
    """What a call allocates (> 0) and frees on the CPU, in order; and its result."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    release_kept_memory()  # the call would use it and nobody see that
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        result = function()
        release_kept_memory()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"], result
