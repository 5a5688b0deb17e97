# SPDX-License-Identifier: MIT
"""Sorting token rows by expert and back, in plain torch.

No function reads a device value on the host: sizes are upper bounds that the host can compute, and
absent slots are sent to a spare position instead of being counted. (On the CPU a value is a host
value, so there a spare row is appended only where one is needed.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.routing import PermutePlan


def permute_plan(indices: Tensor, num_experts: int, align: int = 1) -> PermutePlan:
    """The order of a stable argsort by expert id, groups padded to multiples of `align` rows."""
    pairs = indices.numel()
    capacity = pairs + num_experts * (align - 1)
    expert = indices.flatten().long()
    expert = expert.masked_fill(expert < 0, num_experts)  # dropped pairs sort last
    ones = torch.ones_like(expert)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=indices.device)
    counts = counts.scatter_add(0, expert, ones)
    padded = (counts + align - 1).div(align, rounding_mode="floor") * align
    starts, padded_starts = counts.cumsum(0) - counts, padded.cumsum(0) - padded

    order = expert.argsort(stable=True)  # sorted position -> pair
    group = expert[order]
    rank = torch.arange(pairs, device=indices.device) - starts[group]
    row = padded_starts[group] + rank
    dropped = group == num_experts

    row_map = torch.empty(pairs, dtype=torch.int32, device=indices.device)
    row_map[order] = row.masked_fill(dropped, -1).int()
    source = torch.full((capacity + 1,), -1, dtype=torch.int32, device=indices.device)
    source[row.masked_fill(dropped, capacity)] = order.int()
    return PermutePlan(
        row_map.view(indices.shape),
        source[:capacity].contiguous(),
        padded.cumsum(0)[:num_experts].int(),
        counts[:num_experts].int(),
    )


def _with_spare_row(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """x with a zero row at its end, and the index with its -1 pointing there."""
    absent = index < 0
    if index.device.type == "cpu" and not bool(absent.any()):
        return x, index
    return torch.cat([x, x.new_zeros(1, x.shape[1])]), index.masked_fill(absent, x.shape[0])


def _gather(x: Tensor, source: Tensor, slots: int) -> Tensor:
    """x[source // slots], zero rows where source is -1."""
    x, index = _with_spare_row(x, source.div(slots, rounding_mode="floor"))
    return x.index_select(0, index)


def _combine(y: Tensor, row_map: Tensor, weights: Tensor | None) -> Tensor:
    """sum_k weights[t, k] * y[row_map[t, k]], slot by slot from k = 0, in fp32 (fp64 for fp64)."""
    if row_map.numel() == 0:
        return y.new_zeros(row_map.shape[0], y.shape[1])
    wide = y if y.dtype == torch.float64 else y.float()
    wide, index = _with_spare_row(wide, row_map)
    if weights is not None:  # an absent slot adds its weight times an exact zero
        weights = weights.to(wide.dtype).masked_fill(row_map < 0, 0.0)
    # A bag sums its rows in the order of its indices, in one pass over y.
    return F.embedding_bag(index, wide, mode="sum", per_sample_weights=weights).to(y.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, row_map: Tensor, source: Tensor) -> Tensor:
        return _gather(x, source, row_map.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        row_map, source = ctx.saved_tensors
        return _Unpermute.apply(dy, row_map, source, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, row_map: Tensor, source: Tensor, weights: Tensor | None) -> Tensor:
        return _combine(y, row_map, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        y, row_map, source, weights = ctx.saved_tensors
        rows = _Permute.apply(dout, row_map, source)  # [cap, H]: each row its token's gradient
        if weights is None:
            return rows, None, None, None
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        # d(weights) comes from the same gathered rows: one dot product for each.
        dots = torch.bmm(rows.to(wide)[:, None], y.to(wide)[:, :, None])[:, 0]  # [cap, 1]
        dweights = _Permute.apply(dots, source[:, None], row_map.flatten()).view(weights.shape)
        scale = _Permute.apply(weights.reshape(-1, 1), row_map.view(-1, 1), source)
        return (rows * scale).to(y.dtype), None, None, dweights.to(weights.dtype)


def permute(x: Tensor, plan: PermutePlan) -> Tensor:
    """y [cap, H]: row r is x[source[r] // K], padding rows are zero."""
    return _Permute.apply(x, plan.row_map, plan.source)


def unpermute(y: Tensor, plan: PermutePlan, weights: Tensor | None = None) -> Tensor:
    """x [T, H]: sum over the slots of weights[t, k] * y[row_map[t, k]]."""
    return _Unpermute.apply(y, plan.row_map, plan.source, weights)


def sort_chunks(x: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    """The chunks of x [R, H] in a new order; rows past the last chunk become zero rows."""
    if order.numel() == 0 or x.shape[0] == 0:
        return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)
    order = order.long()
    ends = split_sizes.long().cumsum(0)
    new_sizes = split_sizes.long()[order]
    new_ends = new_sizes.cumsum(0)
    row = torch.arange(x.shape[0], device=x.device)
    chunk = torch.searchsorted(new_ends, row, right=True)  # one past the last for the tail
    inside = chunk < order.numel()
    chunk = chunk.clamp(max=order.numel() - 1)
    shift = (ends - split_sizes.long())[order] - (new_ends - new_sizes)
    source = torch.where(inside, row + shift[chunk], row)
    return x.index_select(0, source).masked_fill(~inside[:, None], 0)
