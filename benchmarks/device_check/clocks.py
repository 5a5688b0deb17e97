# SPDX-License-Identifier: MIT
"""Clocks inside of kernels, from clocks.cu: where the plan, the gate and the FP8 loop spend theirs.

plan      between the points of permute_plan_sm90.cu, beside what its header predicts
gate      between those of choose.cuh, the last token of each warp
fp8       a block of 128 of depth, from every eighth one of a block's last tile (768 is wgmma's
          own); and how far the two consumers are apart, of that period
one row   128 rows of 128 bytes by a TMA load each: words in other places than one box puts
          them, cycles until all are issued, and until they are there
permute   us with stores as shipped (.cs), plain, and first to leave the L2
"""

import argparse
import ctypes
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from benchmarks.checkout import PREPARED

BLOCKS, WARPS, POINTS = 16, 32, 16  # Clocks of csrc/device/clock.cuh
PHASES = {
    "plan 4096 x 8 of 384": (
        ("wait", 0), ("ids, pairs of a warp", 1380), ("prefix over warps", 350), ("cluster", 250),
        ("sums, scan", 500), ("rows, sorting", 800), ("source", 600), ("padding", 0),
    ),
    "plan 8192 x 16 of 896": (
        ("wait", 0), ("ids, pairs of a warp", 3100), ("prefix over warps", 400), ("cluster", 250),
        ("sums, scan", 500), ("rows, sorting", 2000), ("source", 1500), ("padding", 0),
    ),
    "gate 32768 x 384": (
        ("row, estimates", 0), ("tau", 0), ("candidates", 0), ("exact scores", 0),
        ("slots", 0), ("sum, weights", 0),
    ),
}  # fmt: skip
FP8 = "fp8 4 x 8192"
FIRST_CONSUMER, GROUP_WARPS, EVERY = 4, 4, 8  # warps; blocks of depth from mark to mark
STORES = ("as shipped", "plain", "evicted first")


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("kimi_clocks", "kimi_one_row", "kimi_permute_stores"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def called(message: bytes) -> None:
    if message:
        raise RuntimeError(message.decode())


def clocks(library: ctypes.CDLL, name: str, scale: int) -> np.ndarray:
    """[blocks, warps, points]; 0 where a warp never came."""
    found = np.zeros((BLOCKS, WARPS, POINTS), np.int64)
    called(library.kimi_clocks(name.encode(), scale, found.ctypes.data_as(ctypes.c_void_p)))
    return found


def phases(found: np.ndarray, count: int) -> list[float]:
    """The median over the warps of what each of `count` phases took."""
    came = found[(found[..., : count + 1] > 0).all(-1)][:, : count + 1]
    if not len(came):
        raise RuntimeError("no warp came to all of its points")
    steps = np.diff(came, axis=1)
    return [float(statistics.median(column)) for column in steps.T.tolist()]


def loop(found: np.ndarray) -> dict[str, float]:
    """Of the FP8 loop: cycles a block of depth, and the consumers' distance in such periods."""
    first, second = (found[:, FIRST_CONSUMER + GROUP_WARPS * consumer] for consumer in range(2))
    both = (first > 0) & (second > 0)
    periods = np.concatenate([np.diff(row[ok]) for row, ok in zip(first, both, strict=True)])
    period = float(np.median(periods)) / EVERY
    apart = np.median(((second - first)[both] / period) % 1.0)
    return {"cycles a block of depth": period, "apart, periods": float(apart)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=PREPARED / "clocks.so")
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    library, scale = load(options.library), options.scale
    result: dict[str, dict[str, object]] = {}
    for name, parts in PHASES.items():
        taken = phases(clocks(library, name, scale), len(parts))
        row = result[name] = {}
        for (phase, predicted), cycles in zip(parts, taken, strict=True):
            row[phase] = {"cycles": cycles} | ({"predicted": predicted} if predicted else {})
    result[FP8] = dict(loop(clocks(library, FP8, scale)))
    for swizzled in (0, 1):
        words = np.zeros(3, np.int64)
        pointer = words.ctypes.data_as(ctypes.c_void_p)
        message = library.kimi_one_row(swizzled, pointer)
        names = ("words elsewhere", "issued", "landed")
        row = result[f"one row{', swizzled' if swizzled else ''}"] = dict(
            zip(names, words.tolist(), strict=True)
        )
        if message:
            row["refused"] = message.decode()
    times = np.zeros(len(STORES))
    called(library.kimi_permute_stores(scale, times.ctypes.data_as(ctypes.c_void_p)))
    result["permute, us"] = dict(zip(STORES, times.tolist(), strict=True))
    for name, row in result.items():
        print(name)
        for key, value in row.items():
            print(f"    {key:<28}{value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
