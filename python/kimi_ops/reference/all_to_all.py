# SPDX-License-Identifier: MIT
"""Dispatch and combine of any number of ranks, in one process: lists hold one entry a rank.

Written from the definition, in loops over ranks, tokens and slots: it shares nothing with what it
judges but the FP8 of `kimi_ops.formats`, which its tests hold to numbers by hand. Differentiable by
torch; float64 stays float64.

    dispatch   the pairs (source rank, token, slot) whose expert a rank owns become its rows, sorted
               by (expert, source rank, token, slot)
    combine    rank_dedup     part[t, r] = sum over the slots of t on rank r, ascending, fp32,
                                           acc = fma(w, out, acc), rounded once to the wire's dtype
                              y[t] = sum over the ranks, ascending, fp32, rounded once
                 with nodes   the parts of a node are added up by rank first, fp32, and rounded
                              once to the wire's dtype; then y[t] = sum over the nodes, ascending
               expert_direct  y[t] = sum over the slots, ascending, fp32, acc = fma(w, out, acc),
                                     out rounded to the wire's dtype, y rounded once

Rank r owns E // P neighbouring experts, one more where r < E % P.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kimi_ops.formats import dequantize_rows, quantize_rows

Pair = tuple[int, int, int]  # source rank, token, slot


class Received(NamedTuple):
    """The rows of one rank's experts."""

    x: Tensor  # [R, H]
    offsets: Tensor  # [experts of the rank] int32, inclusive ends
    tokens_per_expert: Tensor  # [experts of the rank] int32, without padding
    pairs: list[Pair | None]  # where each row comes from, None for padding
    dropped: int


def experts_of(num_experts: int, world: int) -> list[range]:
    """The experts of every rank."""
    owned, first = [], 0
    for rank in range(world):
        last = first + num_experts // world + (rank < num_experts % world)
        owned.append(range(first, last))
        first = last
    return owned


def dispatch(
    xs: Sequence[Tensor],
    indices: Sequence[Tensor],
    num_experts: int,
    *,
    expert_alignment: int = 1,
    capacity: int | None = None,
    overflow: str = "raise",
    wire_dtype: torch.dtype | None = None,
) -> list[Received]:
    """What every rank receives of tokens xs[r] [T_r, H] with experts indices[r] [T_r, K].

    Ids -1 and E are dropped. `capacity` rows are given on every rank. More rows raise ValueError,
    make room in multiples of the capacity ("grow"), or lose ("drop") of every expert the last rows
    beyond a level, the highest that fits.
    """
    found = []
    for owned in experts_of(num_experts, len(xs)):
        rows: list[list[Pair]] = [[] for _ in owned]
        for source, ids in enumerate(indices):
            for token, slots in enumerate(ids.tolist()):
                for slot, expert in enumerate(slots):
                    if expert in owned:
                        rows[expert - owned.start].append((source, token, slot))
        found.append(rows)
    sizes = [_size(rows, expert_alignment) for rows in found]
    room = capacity
    if capacity is not None and max(sizes) > capacity:
        if overflow == "raise":
            raise ValueError(f"capacity: {max(sizes)} rows for {capacity}")
        if overflow == "grow":
            room = -(-max(sizes) // capacity) * capacity
    wired = [_through(x, wire_dtype) for x in xs]
    return [_received(rows, wired, expert_alignment, room) for rows in found]


def _received(
    rows: list[list[Pair]], xs: Sequence[Tensor], align: int, capacity: int | None
) -> Received:
    whole = sum(map(len, rows))
    if capacity is not None:
        level = max(map(len, rows))
        while _size([of[:level] for of in rows], align) > capacity:
            level -= 1
        rows = [of[:level] for of in rows]
    pairs: list[Pair | None] = []
    offsets = []
    for of in rows:
        pairs += of
        pairs += [None] * (-len(of) % align)
        offsets.append(len(pairs))
    if capacity is not None:
        pairs += [None] * (capacity - len(pairs))
    zero = xs[0].new_zeros(xs[0].shape[1])
    values = [zero if pair is None else xs[pair[0]][pair[1]] for pair in pairs]
    return Received(
        torch.stack(values) if values else xs[0].new_zeros(0, xs[0].shape[1]),
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor([len(of) for of in rows], dtype=torch.int32),
        pairs,
        whole - sum(map(len, rows)),
    )


def combine(
    outs: Sequence[Tensor],
    received: Sequence[Received],
    indices: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    layout: str = "rank_dedup",
    wire_dtype: torch.dtype | None = None,
    ranks_per_node: int | None = None,
) -> list[Tensor]:
    """y [T_r, H] of every rank from outs[r] [R_r, H]; 1 stands for absent weights."""
    places: dict[Pair, tuple[int, int]] = {}
    for rank, rows in enumerate(received):
        places |= {pair: (rank, row) for row, pair in enumerate(rows.pairs) if pair is not None}
    wire = outs[0].dtype if wire_dtype in (None, torch.float8_e4m3fn) else wire_dtype
    wide = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    results = []
    for source, ids in enumerate(indices):
        tokens = []
        for token in range(len(ids)):
            parts: list[int | None] = [None]  # all ranks' rows, in slot order
            if layout == "rank_dedup":
                parts = [*range(len(outs))]
            total = outs[0].new_zeros(outs[0].shape[1], dtype=wide)
            within = torch.zeros_like(total)  # of the ranks of a node
            for only in parts:
                part = torch.zeros_like(total)
                for slot in range(ids.shape[1]):
                    place = places.get((source, token, slot))
                    if place is None or only not in (None, place[0]):
                        continue
                    value = outs[place[0]][place[1]].to(wide)
                    value = _rounded(value, wire) if only is None else value
                    weight = None if weights is None else weights[source][token, slot]
                    part = _add(part, value, weight)
                if only is None:
                    total = part
                elif ranks_per_node is None:
                    total = total + _rounded(part, wire)
                else:
                    within = within + _rounded(part, wire)
                    if (only + 1) % ranks_per_node == 0:
                        total, within = total + _rounded(within, wire), torch.zeros_like(total)
            tokens.append(total.to(outs[0].dtype))
        results.append(torch.stack(tokens) if tokens else outs[0].new_zeros(0, outs[0].shape[1]))
    return results


def _size(rows: list[list[Pair]], align: int) -> int:
    return sum(len(of) + -len(of) % align for of in rows)


def _through(x: Tensor, wire: torch.dtype | None) -> Tensor:
    """x after its way: rounded to the wire's dtype, FP8 with a scale for each 128 columns."""
    if wire == torch.float8_e4m3fn:
        return dequantize_rows(*quantize_rows(x)).to(x.dtype)
    return x if wire is None else x.to(wire).to(x.dtype)


def _rounded(x: Tensor, wire: torch.dtype | None) -> Tensor:
    return x.to(wire).to(x.dtype)


def _add(total: Tensor, value: Tensor, weight: Tensor | None) -> Tensor:
    """total + weight * value with one rounding: products of fp32 are exact in fp64."""
    if weight is None:
        return total + value
    return (total.double() + weight.double() * value.double()).to(total.dtype)
