# SPDX-License-Identifier: MIT
"""Each primitive on the GPU against its host model, a process each: one fault does not hide the
others. Both halves come from the prepared folder."""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkout import PREPARED
from benchmarks.device_check.suites import SUITES, load

SECONDS = 45  # for all; a primitive that hangs takes its suite's share
PROCESSES = 8


def same(suite: str, name: str, device: Path, host: Path) -> str:
    """ "same", or how the halves differ."""
    tests = SUITES[suite].tests()
    halves = load(device), load(host)
    try:
        if hasattr(tests, "test_device_half_agrees_with_host_model"):  # knows the exceptions
            tests.test_device_half_agrees_with_host_model(name, *halves)
        else:
            on_device, on_host = (tests.run(half, name) for half in halves)
            wrong = np.flatnonzero(on_device != on_host)
            count, first = len(wrong), wrong[:6].tolist()
            assert not count, f"{count} of {len(on_device)} words differ, first {first}"
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return " | ".join(lines[:3])[:300] or "an assertion failed"
    return "same"


def missing(suite: str) -> str:
    """Why no device half can run here, or ""; a process of its own asks, as the driver stays in
    it."""
    return SUITES[suite].missing(SUITES[suite].tests()) or ""


def compare(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each suite, and for its primitives "same" or what is wrong. No CUDA call is made before the
    fork."""
    context, last = multiprocessing.get_context("fork"), time.monotonic() + SECONDS
    for number, (name, suite) in enumerate(SUITES.items()):
        start = time.monotonic()
        end = start + (last - start) / (len(SUITES) - number)
        device, host = (folder / f"{name}_{half}.so" for half in ("gpu", "host"))
        tests = suite.tests()
        with context.Pool(PROCESSES, maxtasksperchild=1) as pool:
            if reason := answer(pool.apply_async(missing, (name,)), end):
                yield name, {"all": reason}
                continue
            each = suite.names(tests, load(host))
            pending = {one: pool.apply_async(same, (name, one, device, host)) for one in each}
            found = {one: answer(wait, end) for one, wait in pending.items()}
        yield name, found


def answer(pending: Any, end: float) -> str:
    try:
        return str(pending.get(timeout=max(0.1, end - time.monotonic())))
    except multiprocessing.TimeoutError:
        return "no answer: its process hung or ended"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    bad = 0
    for suite, results in compare(PREPARED):
        found[suite] = results
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        wrong = {name: what for name, what in results.items() if what != "same"}
        right = len(results) - len(wrong)
        print(f"{suite}: {len(results)} primitives, {right} the same", flush=True)
        for name, what in wrong.items():
            print(f"  {name}: {what}")
        bad += len(wrong)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
