# SPDX-License-Identifier: MIT
"""Where the rows of tokens go: a plan of plain tensors, which kernels and twins read alike."""

from typing import NamedTuple

from torch import Tensor


class PermutePlan(NamedTuple):
    """Where every (token, slot) pair goes; see `kimi_ops.permute_plan`."""

    row_map: Tensor  # [T, K] int32, destination row, -1 dropped
    source: Tensor  # [cap] int32, t * K + k, -1 padding
    offsets: Tensor  # [E] int32, inclusive end row of each expert
    tokens_per_expert: Tensor  # [E] int32
