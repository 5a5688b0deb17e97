# SPDX-License-Identifier: MIT
"""One command for a machine with a GPU: build, primitives, op tests, compute-sanitizer, benchmarks.

``python -m benchmarks.device_check [--out FOLDER]`` builds the library in place (no pip), runs each
step under its own time limit and all of them within nine minutes, and writes ``device_check.json``
and ``device_check.log`` to FOLDER. The exit status is 0 if every step passed, 1 if one did not, and
2, with nothing written, on a machine without a GPU or without nvcc.
"""

import argparse
import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 530.0
TAIL_CHARACTERS = 4000


@dataclass
class Step:
    """One command with its time limit; `needs` is a program without which the step is skipped."""

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    accept: tuple[int, ...] = (0,)


@dataclass
class Result:
    name: str
    command: str
    limit_s: float
    status: str  # passed | failed | timed out | skipped
    wall_s: float = 0.0
    returncode: int | None = None
    tail: str = ""


def gpu_missing() -> str | None:
    """Why there is nothing to check here, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no GPU here: libcuda.so.1 cannot be loaded"
    count = ctypes.c_int()
    if (
        driver.cuInit(0) != 0
        or driver.cuDeviceGetCount(ctypes.byref(count)) != 0
        or not count.value
    ):
        return "no GPU here: the driver finds no device"
    if shutil.which("nvcc") is None:
        return "no nvcc on the PATH: put the CUDA toolkit's bin folder there"
    return None


def plan(out: Path) -> list[Step]:
    """The steps, most telling first; their limits add up to less than TOTAL_SECONDS."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-x", "--durations=5"]
    build = {"KIMI_OPS_CUDA": "on", "KIMI_OPS_TESTS": "OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "16"}
    build["CMAKE_ARGS"] = "-DKIMI_OPS_GENERIC_ARCHITECTURES='80;90-real'"  # no driver compilation
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    primitives = ["tests/gpu/test_primitives.py", "tests/gpu/test_primitives_sm90.py"]
    small = [*python, "-m", "pytest", "-q", primitives[0], "-k", "device_half"]
    files = ("topk_gate", "permute", "balance", "grouped_gemm_torch", "fused_experts_torch", "fp8")
    some = "groups or empty or ties or contract or valid or nan_stays or awkward_sizes or no_rows"
    ops = [*python, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in files)]
    ops += ["-k", f"cuda and ({some})"]
    results = str(out / "benchmarks.json")
    return [
        Step("build", [*python, "setup.py", "build_ext", "--inplace"], 150, build),
        Step("primitives", [*pytest, *primitives], 50),
        Step("op tests", [*pytest, "tests", "-k", "cuda"], 110),
        Step("memcheck", [*sanitizer, "--tool", "memcheck", *small], 30, needs=sanitizer[0]),
        Step("racecheck", [*sanitizer, "--tool", "racecheck", *small], 30, needs=sanitizer[0]),
        Step("memcheck ops", [*sanitizer, "--tool", "memcheck", *ops], 60, needs=sanitizer[0]),
        Step(
            "benchmarks",
            [*python, "-m", "benchmarks", "--device", "cuda", "--quick", "--json", results],
            100,
        ),
    ]


def run_step(step: Step, seconds_left: float, log: TextIO) -> Result:
    """Runs one step; it and all that it started are killed at the limit."""
    limit = min(step.limit_s, seconds_left)
    result = Result(step.name, " ".join(step.command), round(limit, 1), "skipped")
    if limit < 1.0:
        result.tail = "no time left"
        return result
    if step.needs is not None and shutil.which(step.needs) is None:
        result.tail = f"{step.needs} is not on the PATH"
        return result
    log.write(f"==== {step.name}: {result.command}\n")
    log.flush()
    begin = log.tell()
    start = time.monotonic()
    paths = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"PYTHONUNBUFFERED": "1", **step.environment}
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        result.returncode = process.wait(timeout=limit)
        result.status = "passed" if result.returncode in step.accept else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        result.returncode = process.wait()
        result.status = "timed out"
    result.wall_s = round(time.monotonic() - start, 2)
    with open(log.name) as written:
        written.seek(begin)
        result.tail = written.read()[-TAIL_CHARACTERS:]
    log.seek(0, os.SEEK_END)
    return result


def output_of(*command: str) -> str:
    try:
        return subprocess.check_output(command, text=True, cwd=ROOT, timeout=20).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> dict[str, str]:
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    return {
        "gpu": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "nvcc": output_of("nvcc", "--version").splitlines()[-1],
        "python": platform.python_version(),
        "torch": output_of(sys.executable, "-c", "import torch; print(torch.__version__)"),
        "cpu": platform.processor() or platform.machine(),
        "commit": output_of("git", "rev-parse", "HEAD"),
    }


def check(steps: Sequence[Step], out: Path, total_seconds: float = TOTAL_SECONDS) -> list[Result]:
    """Runs the steps within `total_seconds`; if the first, the build, fails, no other runs."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total_seconds
    results: list[Result] = []
    with open(out / "device_check.log", "w") as log:
        for step in steps:
            if results and results[0].status in ("failed", "timed out"):
                results.append(Result(step.name, " ".join(step.command), 0.0, "skipped"))
                results[-1].tail = f"{results[0].name} {results[0].status}"
            else:
                results.append(run_step(step, end - time.monotonic(), log))
            print(f"{results[-1].status:10} {step.name:12} {results[-1].wall_s:7.1f} s", flush=True)
    return results


def write_json(results: Sequence[Result], out: Path) -> None:
    report: dict[str, object] = {"machine": machine(), "steps": [asdict(r) for r in results]}
    measured = sorted(out.glob("benchmarks_*.json"))
    report["benchmarks"] = {path.stem: json.loads(path.read_text()) for path in measured}
    for path in measured:
        path.unlink()
    temporary = out / "device_check.json.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.rename(out / "device_check.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "device_check")
    out: Path = parser.parse_args(arguments).out.resolve()
    if reason := gpu_missing():
        print(f"device_check: {reason}; nothing was run or written", file=sys.stderr)
        return 2
    results = check(plan(out), out)
    write_json(results, out)
    print(f"{out / 'device_check.json'}\n{out / 'device_check.log'}")
    return 0 if all(r.status in ("passed", "skipped") for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
