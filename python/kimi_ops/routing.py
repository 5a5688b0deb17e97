# SPDX-License-Identifier: MIT
"""Where the rows of tokens go: a plan of plain tensors, which kernels and twins read alike."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PermutePlan(NamedTuple):
    """Where every (token, slot) pair goes; see `kimi_ops.permute_plan`."""

    row_map: Tensor  # [T, K] int32, destination row, -1 dropped
    source: Tensor  # [cap] int32, t * K + k, -1 padding
    offsets: Tensor  # [E] int32, inclusive end row of each expert
    tokens_per_expert: Tensor  # [E] int32

    def to(self, device: Any, *, non_blocking: bool = False) -> "PermutePlan":
        """The plan on another device, as `torch.Tensor.to`."""
        return PermutePlan._make(x.to(device, non_blocking=non_blocking) for x in self)


def as_int32(ids: Tensor) -> Tensor:
    """int64 ids as kernels take them; one beyond int32 stays out of every range."""
    if getattr(ids, "dtype", None) != torch.int64:
        return ids
    return ids.clamp(-(2**31), 2**31 - 1).int()


def as_float32(weights: Tensor) -> Tensor:
    """Weights of 16 bits as kernels take them; differentiable."""
    if getattr(weights, "dtype", None) in (torch.bfloat16, torch.float16):
        return weights.float()
    return weights
