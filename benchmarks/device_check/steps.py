# SPDX-License-Identifier: MIT
"""One command after another, each with its own limit; what they leave is kept as they go.

The logs stand in one archive and what the steps found in one JSON. Both are replaced after every
step, the archive every few seconds as well, so that a run which is killed leaves what it has.
"""

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT
from benchmarks.device_check.junit import summary

TICK_SECONDS = 10.0
GRACE_SECONDS = 5.0  # between the request to end, at which pytest writes its results, and the kill
SHOWN_LINES, SHOWN_WIDTH = 45, 200


@dataclass
class Step:
    """`result` is the file in the folder of logs, JSON or pytest's XML, that the command writes
    (XML in which no test passed is a failure); `needs` a program without which it is skipped."""

    name: str
    command: list[str]
    limit_s: float
    result: str | None = None
    needs: str | None = None
    variables: dict[str, str] = field(default_factory=dict)  # of its environment


@dataclass
class Result:
    name: str
    command: str
    limit_s: float
    status: str = "skipped"  # | no time | passed | failed | timed out | stopped
    wall_s: float = 0.0
    returncode: int | None = None
    tail: str = ""
    found: Any = None


class Stopped(BaseException):
    """The runner was told to end."""


class Record:
    """`device_check.json` and `logs.tgz` in `out`, and the folder in which the steps write."""

    def __init__(self, out: Path, logs: Path, about: dict[str, Any]) -> None:
        self.out, self.logs, self.about = out, logs, about
        self.results: list[Result] = []
        out.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        self.archive()
        report = self.about | {"steps": [asdict(result) for result in self.results]}
        temporary = self.out / "device_check.json.tmp"
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(self.out / "device_check.json")

    def archive(self) -> None:
        temporary = self.out / "logs.tgz.tmp"
        with tarfile.open(temporary, "w:gz", compresslevel=1) as archive:
            archive.add(self.logs, "logs")
        temporary.replace(self.out / "logs.tgz")


def check(steps: Sequence[Step], record: Record, seconds: float) -> list[Result]:
    """Runs the steps within `seconds`; if the first fails, no other runs. SIGTERM and SIGINT end
    the step and the run."""

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    end = time.monotonic() + seconds
    results = record.results
    try:
        for step in steps:
            result = Result(step.name, " ".join(step.command), step.limit_s)
            results.append(result)
            first = results[0]
            if first is not result and first.status != "passed":
                result.tail = f"{first.name} {first.status}"
            else:
                run_step(step, result, end - time.monotonic(), record)
            record.write()
            show(result)
    except Stopped as reason:
        results[-1].status, results[-1].tail = "stopped", f"by {reason}"
        record.write()
        show(results[-1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return results


def run_step(step: Step, result: Result, seconds_left: float, record: Record) -> None:
    result.limit_s = round(min(step.limit_s, seconds_left), 1)
    if result.limit_s < 1.0:
        result.status, result.tail = "no time", "expected a second or more, all are used: --seconds"
        return
    if step.needs is not None and shutil.which(step.needs) is None:
        result.tail = f"{step.needs} is not on the PATH"
        return
    paths = [str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"} | step.variables
    path = record.logs / f"{step.name.replace(' ', '_')}.log"
    start = time.monotonic()
    with open(path, "w") as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        if wait(process, start + result.limit_s, record.archive):
            result.status = "passed" if process.returncode == 0 else "failed"
        else:
            result.status = "timed out"
    finally:
        end(process)
        result.returncode = process.returncode
        result.wall_s = round(time.monotonic() - start, 2)
        result.tail = path.read_text(errors="replace")[-4000:]
        result.found = read_result(record.logs / step.result) if step.result else None
    tests = step.result is not None and step.result.endswith(".xml")
    none = not (isinstance(result.found, dict) and result.found.get("passed"))
    if tests and none and result.status == "passed":
        result.status = "failed"
        result.tail = f"expected tests that pass, got none\n{result.tail}"


def wait(process: "subprocess.Popen[bytes]", until: float, tick: Callable[[], None]) -> bool:
    """Whether the process ended in time."""
    while (left := until - time.monotonic()) > 0:
        try:
            process.wait(timeout=min(TICK_SECONDS, left))
            return True
        except subprocess.TimeoutExpired:
            tick()
    return False


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and all that it started."""
    for number, seconds in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            if process.poll() is None or number == signal.SIGKILL:
                os.killpg(process.pid, number)
            process.wait(timeout=seconds)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            continue


def read_result(path: Path) -> Any:
    """What a step wrote, or the sentence why there is nothing."""
    try:
        return summary(path) if path.suffix == ".xml" else json.loads(path.read_text())
    except FileNotFoundError:
        return f"{path.name} was not written"
    except (ValueError, SyntaxError) as error:
        return f"{path.name} cannot be read: {error}"


def show(result: Result) -> None:
    print(f"== {result.status:<10} {result.name:<22} {result.wall_s:7.1f} s", flush=True)
    found, lines = result.found, result.tail.splitlines()
    if isinstance(found, dict) and "passed" in found:
        counts = {k: len(v) if isinstance(v, dict) else v for k, v in found.items()}
        kinds = ("passed", "failed", "crashed", "skipped")
        lines = [", ".join(f"{counts[kind]} {kind}" for kind in kinds)]
        lines += [f"{name}: {why}" for k in ("failed", "crashed") for name, why in found[k].items()]
        lines += [result.tail] if not counts["passed"] else []
    for line in lines[:SHOWN_LINES]:
        print(f"   {line[:SHOWN_WIDTH]}", flush=True)
