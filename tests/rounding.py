# SPDX-License-Identifier: MIT
"""How much the sums of an engine may err: bounds from the depth of a sum and the formats.

UNIT is half a unit in the last place, u = 2^-24 that of fp32. Errors are relative, ||c - exact|| /
||exact||, of many sums of products of random signs, whose partial sums grow as the root of the
depth.

- Rounded to nearest, each addition errs at random by up to u of its partial sum: together
  u sqrt(depth / 6). Engines of a CPU, kernels of fp32 and the host models of the others do so.
- The tensor cores of a GPU cut off what does not fit, once in each step of their depth: half a
  unit of the partial sum, always towards zero. On average over significands that is 0.72 u, and
  the partial sums of a sum are on average half of it: 0.36 u steps. An H100 measured 0.31.
- Storing the result in 16 bits adds UNIT of that format at most.

Bounds are 1.25 times that, plus 2 u for what is done around a sum and for few numbers, of which
one may lie beyond.
"""

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, or the former where that is zero."""
    value, exact = value.detach().double(), exact.detach().double()
    norm, difference = exact.norm(), (value - exact).norm()
    return float(difference / norm if norm > 0 else difference)


def tensor_core_depth(engine, dtype: torch.dtype) -> int | None:
    """Products that the engine adds at once, cutting off low bits; None where it rounds."""
    if engine.device != "cuda" or dtype == torch.float32:
        return None
    return 16 if torch.cuda.get_device_capability()[0] >= 9 else 8


def rounded_sum(depth: int) -> float:
    return UNIT[torch.float32] * (2 + 1.25 * (depth / 6) ** 0.5)


def truncated_sum(depth: int, at_once: int) -> float:
    steps = -(-depth // at_once)
    return rounded_sum(steps) + UNIT[torch.float32] * 1.25 * 0.36 * steps


def sum_bound(engine, depth: int, dtype: torch.dtype, out: torch.dtype | None = None) -> float:
    """Of the relative error of sums of `depth` products of operands in `dtype`, stored in `out`."""
    at_once = tensor_core_depth(engine, dtype)
    of_sum = rounded_sum(depth) if at_once is None else truncated_sum(depth, at_once)
    out = out or dtype
    return of_sum + (UNIT[out] if out != torch.float32 else 0.0)


def fp8_bound(engine, served: bool) -> float:
    """Of a sum of FP8 products and of the sum of their sizes: a bound of each element's error, but
    for the result's rounding. Hopper's tensor cores keep about 14 bits of a sum of 128; a GPU
    without the kernel rounds both operands to bfloat16 first."""
    if not engine.name.startswith(("cuda", "simt")) or (served and engine.device != "cuda"):
        return 2.0**-22
    return 2.0**-12 if served else (1 + UNIT[torch.bfloat16]) ** 2 - 1 + 2.0**-22
