# SPDX-License-Identifier: MIT
"""Plans of rows from the maps that other libraries carry: index maps, masks, destination rows.

Nothing is read on the host but what is said to be. A plan's T x K pairs are (token, slot); a mask
[T, E] has a slot for each expert.
"""

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.moe.permute import permute, permute_plan, unpermute
from kimi_ops.routing import PermutePlan, as_int32

MOST_EXPERTS = 1024  # of permute_plan: an index map does not say how many there are


def by_index(op: str, name: str, indices: Tensor, tokens: int, rows: int | None) -> PermutePlan:
    """Of experts [T, K] or [T], sorted by (expert, token, slot) and cut to `rows` where given."""
    _check.tensor(op, name, indices)
    _check.dtype(op, name, indices, (torch.int32, torch.int64, torch.int16, torch.uint8))
    indices = indices.unsqueeze(1) if indices.dim() == 1 else indices
    _check.shape(op, name, indices, (tokens, "K"), "give a row of experts a token")
    return permute_plan(
        (indices if indices.dtype == torch.int64 else indices.int()),
        MOST_EXPERTS,
        num_out_tokens=rows,
    )


def by_mask(
    op: str, routing_map: Tensor, tokens: int, rows: int | None, align: int = 1
) -> PermutePlan:
    """Of a mask [T, E], sorted by (expert, token) and cut to `rows` where given."""
    _check.tensor(op, "routing_map", routing_map)
    _check.shape(op, "routing_map", routing_map, (tokens, "E"), "give a row of experts a token")
    experts = routing_map.shape[1]
    return permute_plan(routing_map != 0, experts, align=align, num_out_tokens=rows)


def by_rows(row_map: Tensor, rows: int) -> PermutePlan:
    """Of the destination row of each pair [T, K], -1 for dropped ones; `rows` in all.

    Its offsets and counts are empty: nothing that moves rows reads them.
    """
    row_map = as_int32(row_map).int().contiguous()
    pairs = torch.arange(row_map.numel(), dtype=torch.int32, device=row_map.device)
    place = row_map.flatten().long()
    source = pairs.new_full((rows + 1,), -1)  # the last one takes what is dropped
    source.scatter_(0, torch.where(place < 0, rows, place), pairs)
    none = row_map.new_empty(0)
    return PermutePlan(row_map, source[:rows].contiguous(), none, none)


def pairs_to_rows(values: Tensor, plan: PermutePlan) -> Tensor:
    """values [T, K] of any dtype but float64 to [R]: 0 for padding; differentiable."""
    flat = plan._replace(row_map=plan.row_map.reshape(-1, 1))
    return permute(values.reshape(-1, 1), flat).view(-1)


def rows_to_tokens(y: Tensor, row_map: Tensor, weights: Tensor | None) -> Tensor:
    """``x[t] = sum_k weights[t, k] * y[row_map[t, k]]`` in fp32, rounded once to the dtype of y."""
    weights = None if weights is None else weights.float()
    return unpermute(y, by_rows(row_map, len(y)), weights)
