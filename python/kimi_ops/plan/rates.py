# SPDX-License-Identifier: MIT
"""What products of K2's experts reach on an H100, measured; anywhere else, the roofs of a machine.

TFLOP/s of bf16 grouped products by rows an expert, from benchmarks/results/h100_grouped_gemm.json
(a test holds the two together). Between rows the logarithms are interpolated; below the first the
weights bound it, so the rate goes with the rows; above the last it stays.
"""

from bisect import bisect_left
from math import exp, log

from kimi_ops.plan.counts import WEIGHT_BYTES
from kimi_ops.plan.hardware import Hardware

__all__ = ["K2_EXPERT", "MEASURED", "MODEL", "expert_products", "measured_tflops"]

K2_EXPERT = (7168, 2048)  # hidden, expert hidden
MEASURED, MODEL = "measured on an H100", "model"

# (product, pass): {rows an expert: TFLOP/s}; wgrad adds to an fp32 gradient
TABLE: dict[tuple[str, str], dict[int, float]] = {
    ("gate+up", "fwd"): {
        4: 9.8, 21: 50.6, 64: 142.2, 128: 328.9, 256: 619.0, 1024: 695.1, 8192: 695.7,
    },
    ("gate+up", "dgrad"): {64: 150.7, 256: 593.1, 1024: 700.6, 8192: 753.7},
    ("gate+up", "wgrad acc fp32"): {64: 30.2, 256: 116.6, 1024: 385.7, 8192: 637.3},
    ("down", "fwd"): {21: 57.3, 64: 127.1, 256: 441.3, 1024: 677.1, 8192: 626.8},
}  # fmt: skip


def measured_tflops(product: str, pass_: str, rows: float) -> float:
    """TFLOP/s at `rows` rows an expert."""
    table = TABLE[product, pass_]
    known = list(table)
    if rows <= known[0]:
        return table[known[0]] * rows / known[0]
    if rows >= known[-1]:
        return table[known[-1]]
    above = bisect_left(known, rows)
    low, high = known[above - 1], known[above]
    part = log(rows / low) / log(high / low)
    return exp((1 - part) * log(table[low]) + part * log(table[high]))


def expert_products(
    hardware: Hardware,
    shape: tuple[int, int],
    rows: float,
    rows_each: float,
    parameters: float,
    weights: str,
    *,
    backward: bool = False,
    gradient_bytes: int = 4,
) -> tuple[float, str, str]:
    """Seconds of gate, up and down products of `rows` rows; their bound; where the rate is from.

    Parameters
    ----------
    shape : (hidden, expert hidden)
    rows_each : float
        Rows an expert.
    parameters : float
        Of the experts that get a row.
    weights : str
        bf16, fp8 (products in FP8) or int4 (expanded to bf16 on the way).
    backward : bool
        dgrad and wgrad, the latter added to gradients, instead of the forward.
    """
    hidden, inner = shape
    pair = 2.0 * rows * hidden * 2 * inner  # FLOP of gate and up; down is half
    held = parameters * WEIGHT_BYTES[weights][0]
    moved = 2 * rows * (2 * hidden + 2 * inner)  # inputs and outputs in 16 bits
    if backward:
        added = 2 * gradient_bytes * parameters
        seconds, bound = hardware.seconds(2 * 1.5 * pair, 2 * moved + held + added)
    else:
        seconds, bound = hardware.seconds(1.5 * pair, moved + held, fp8=weights == "fp8")
    if not hardware.measured or shape != K2_EXPERT or weights != "bf16":
        return seconds, bound, MODEL

    def at(product: str, pass_: str) -> float:
        return 1e12 * measured_tflops(product, pass_, rows_each)

    if backward:
        # down's own were not timed: those of gate and up stand for them
        each = 1 / at("gate+up", "dgrad") + 1 / at("gate+up", "wgrad acc fp32")
        return 1.5 * pair * each, bound, MEASURED
    return pair / at("gate+up", "fwd") + pair / 2 / at("down", "fwd"), bound, MEASURED
