# SPDX-License-Identifier: MIT
"""The parts of a run, by name, as steps with limits; and where the tests are that they run."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.device_check.steps import Step

TESTS = "tests/ops"  # those that run on the engines of a GPU
DOOR = "tests/operators"  # streams and devices of a call
CUPY = "tests/arrays/test_cupy.py"
RANKS = "tests/dist/test_peers_cuda.py"  # several on one GPU
MEMCHECK = ("topk_gate", "permute", "grouped_gemm_torch", "fused_experts_torch")
MEMCHECK_NAMES = "groups or empty or ties or contract or valid or nan_stays or awkward_sizes"
MEMCHECK_NAMES += " or no_rows"
ON_GPU = "cuda and not simt"
WORKERS, TEST_SECONDS = 10, 40

BENCHMARKS = ("topk_gate", "permute", "grouped_gemm", "fused_experts", "all_to_all")
KERNELS = (
    "gate", "gate896", "plan", "permute", "unpermute", "big", "down", "few", "wgrad", "wgradacc",
    "experts", "decode", "fp8",
)  # fmt: skip  # of one_kernel, whose imports the parent of a run cannot resolve
PROFILED = ("gate", "big", "wgradacc", "experts")
SECTIONS = [
    "SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis",
    "SchedulerStats", "Occupancy", "LaunchStats",
]  # fmt: skip
MODULE = [sys.executable, "-m"]


def script(name: str, limit: float, logs: Path, *more: str) -> Step:
    """A program of this package, which writes <name>.json."""
    result = f"{name}.json"
    command = [*MODULE, f"benchmarks.device_check.{name}", *more, "--json", str(logs / result)]
    return Step(name, command, limit, result)


def start(logs: Path) -> Step:
    """The library loads and computes on the GPU; without that nothing else runs."""
    return script("start", 60, logs)


def pytest_command(names: str, paths: list[str]) -> list[str]:
    """Without the options of pyproject.toml, whose plugins the machine may lack."""
    command = [*MODULE, "pytest", "-o", "addopts=", "-q", "--tb=short", "-rf"]
    command += ["-p", "benchmarks.device_check.guard", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    else:
        print("pytest-timeout is missing: a test that hangs takes the whole part's time")
    return [*command, "--continue-on-collection-errors", "-k", names, *paths]


def tests(logs: Path, names: str = ON_GPU, paths: list[str] | None = None) -> list[Step]:
    command = pytest_command(names, paths or [TESTS, DOOR, RANKS])
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--max-worker-restart", "120"]
    else:
        print("pytest-xdist is missing: one process, which ends at the first broken context")
    return [Step("tests", [*command, f"--junitxml={logs / 'tests.xml'}"], 140, "tests.xml")]


def cupy(logs: Path) -> list[Step]:
    """The ops on CuPy's arrays, without torch between."""
    if not importlib.util.find_spec("cupy"):
        print("cupy is missing: the ops on its arrays are left out; install cupy-cuda13x")
        return []
    command = [*pytest_command(ON_GPU, [CUPY]), f"--junitxml={logs / 'cupy.xml'}"]
    return [Step("cupy", command, 90, "cupy.xml")]


def bench(logs: Path) -> list[Step]:
    steps = []
    for name in BENCHMARKS:
        result = f"bench_{name}.json"
        command = [*MODULE, f"benchmarks.bench_{name}", "--device", "cuda", "--quick"]
        command += ["--no-compile", "--json", str(logs / result)]
        steps.append(Step(f"bench {name}", command, 60, result))
    command = [*MODULE, "benchmarks.bench_fused_experts", "--device", "cuda", "--quick"]
    command += ["--cases", "decode", "--json", str(logs / "bench_decode_apart.json")]
    apart = {"KIMI_OPS_OVERLAP": "0"}  # what the overlap of launches is worth
    steps.append(Step("bench decode apart", command, 30, "bench_decode_apart.json", None, apart))
    return steps


def router(logs: Path) -> list[Step]:
    """On the kernels of this GPU, on those of sm_80, and without launches that overlap."""
    steps = []
    for name, variables in (
        ("router", {}),
        ("router sm_80", {"KIMI_OPS_SM": "80"}),
        ("router apart", {"KIMI_OPS_OVERLAP": "0"}),
    ):
        result = f"{name.replace(' ', '_')}.json"
        command = [*MODULE, "benchmarks.device_check.router", "--json", str(logs / result)]
        steps.append(Step(name, command, 20, result, None, variables))
    return steps


def trials(logs: Path) -> list[Step]:
    """In four minutes together."""
    return [script("clocks", 30, logs), script("trials", 210, logs)]


def profile(logs: Path, kernels: tuple[str, ...] = PROFILED) -> list[Step]:
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += [word for section in SECTIONS for word in ("--section", section)]
    program = [*MODULE, "benchmarks.device_check.one_kernel"]
    return [Step(f"ncu {k}", [*ncu, *program, k], 30, needs="ncu") for k in kernels]


def sanitize(logs: Path) -> list[Step]:
    files = [f"{TESTS}/test_{name}.py" for name in MEMCHECK]
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    command += pytest_command(f"{ON_GPU} and ({MEMCHECK_NAMES})", ["-x", *files])
    command += [f"--junitxml={logs / 'memcheck.xml'}"]
    # each tensor an allocation of its own: memcheck sees nothing of torch's pool
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [Step("memcheck", command, 60, "memcheck.xml", "compute-sanitizer", variables)]


PARTS: dict[str, Callable[[Path], list[Step]]] = {
    "tests": tests,
    "cupy": cupy,
    "primitives": lambda logs: [script("primitives", 60, logs)],
    "bench": bench,
    "router": router,
    "host": lambda logs: [script("host_calls", 40, logs)],
    "train": lambda logs: [script("train_step", 60, logs)],
    "trials": trials,
    "profile": profile,
    "sanitize": sanitize,
}
DEFAULT = ("tests", "cupy", "primitives", "bench", "host", "train")
