# SPDX-License-Identifier: MIT
"""What a machine with a GPU is asked, in one call.

prepare, on a machine with nvcc, builds into .gpu/ what has to travel beside the checkout.
run, on the machine with the GPU, runs the parts named and leaves two files in --out:
device_check.json and logs.tgz, both written anew after every part.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.checkout import PREPARED, ROOT
from benchmarks.device_check import parts
from benchmarks.device_check.machine import Refused, facts, gpu_missing, install, prepared
from benchmarks.device_check.prepare import VERSION, prepare
from benchmarks.device_check.steps import Record, check

DEFAULT_SECONDS, LONGEST_SECONDS = 290, 560  # five minutes; ten with time to send the files


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.half == "prepare":
            prepare(PREPARED, options.python)
            return 0
        return run(options)
    except Refused as sentence:
        print(f"device_check {options.half}: {sentence}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """0 if every step passed, 1 if one did not or could not run, 143 if the run was stopped."""
    words = options.parts or parts.DEFAULT
    if unknown := [word for word in words if word not in parts.PARTS]:
        known = ", ".join(parts.PARTS)
        raise Refused(f"expected parts among {known}, got {', '.join(unknown)}")
    if unknown := [name for name in options.kernels if name not in parts.KERNELS]:
        known = ", ".join(parts.KERNELS)
        raise Refused(f"--kernels: expected names among {known}, got {', '.join(unknown)}")
    if reason := gpu_missing():
        raise Refused(f"{reason}; nothing was run or written")
    about = prepared(PREPARED)
    install(PREPARED, about)
    seconds = options.seconds or (LONGEST_SECONDS if options.parts else DEFAULT_SECONDS)
    with tempfile.TemporaryDirectory(prefix="device_check_") as folder:
        logs = Path(folder)
        steps = [parts.start(logs)]
        for word in words:
            made = parts.profile(logs, tuple(options.kernels)) if word == "profile" else None
            steps += made or parts.PARTS[word](logs)
        machine = facts()
        print(f"{machine}\nprepared {about['date']} at {about['commit']}", flush=True)
        record = Record(options.out.resolve(), logs, {"machine": machine, "prepared": about})
        results = check(steps, record, seconds)
    print(f"{record.out / 'device_check.json'}\n{record.out / 'logs.tgz'}")
    statuses = {result.status for result in results}
    return 143 if "stopped" in statuses else int(statuses != {"passed"})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.device_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    halves = made.add_subparsers(dest="half", required=True, metavar="prepare | run")
    half = halves.add_parser("prepare", help="build here what runs there")
    words = f"the interpreter to build for (default: the first Python {VERSION} found)"
    half.add_argument("--python", metavar="PATH", help=words)
    half = halves.add_parser("run", help="check and measure on this machine's GPU")
    words = f"among {', '.join(parts.PARTS)} (default: {' '.join(parts.DEFAULT)})"
    half.add_argument("parts", nargs="*", metavar="PART", help=words)
    words = "folder of the two files (default: $OUT, or build/device_check)"
    out = Path(os.environ.get("OUT") or ROOT / "build" / "device_check")
    half.add_argument("--out", type=Path, metavar="FOLDER", default=out, help=words)
    words = f"for all parts (default: {DEFAULT_SECONDS}; {LONGEST_SECONDS} when parts are named); "
    words += "a part that gets no time, or whose tool is missing, makes the run fail"
    half.add_argument("--seconds", type=float, metavar="N", help=words)
    words = f"of the part profile, among {', '.join(parts.KERNELS)} "
    words += f"(default: {' '.join(parts.PROFILED)})"
    half.add_argument("--kernels", nargs="+", metavar="NAME", default=parts.PROFILED, help=words)
    return made


if __name__ == "__main__":
    sys.exit(main())
