# SPDX-License-Identifier: MIT
"""Who owns which expert, and the two sorts that a dispatch is made of.

    tokens [T, K] --there--> records, by rank --wire--> records --here--> rows, by local expert

                    a record is                  there sorts          here sorts       weights are
    rank_dedup      a token, once a rank         (rank, token)        K slots of it    applied here
    expert_direct   a token, once an expert      (expert, token, slot)  one slot       applied there

Both sorts are plans of `permute_plan`, so rows come in the canonical order (local expert, source
rank, source token, slot), whatever carried them. Combine walks the same way back: a sum in slot
order in fp32, one rounding for the wire, a sum in the order of the plan at home.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.choices import DispatchLayout
from kimi_ops.moe.permute import PermutePlan, permute_plan

LAYOUTS = get_args(DispatchLayout)


class Placement:
    """Which experts a rank owns: E // P neighbours, and one more on the first E % P ranks.

    Of the P ranks only `members` are there, all by default; the experts of the others are nobody's.
    """

    def __init__(self, num_experts: int, world: int, members: Sequence[int] | None = None) -> None:
        small, more = divmod(num_experts, world)
        ends = [rank * small + min(rank, more) for rank in range(world + 1)]
        members = range(world) if members is None else members
        self.ranges = [range(ends[rank], ends[rank + 1]) for rank in members]
        self._experts = num_experts

    def owners(self, device: torch.device) -> Tensor:
        """[E + 1] int64, which member owns an expert; as many as there are for nobody's and for a
        dropped pair, which looks up E."""
        owners = torch.full((self._experts + 1,), len(self.ranges), dtype=torch.int64)
        for member, experts in enumerate(self.ranges):
            owners[experts.start : experts.stop] = member
        return owners.to(device)


@dataclass(frozen=True)
class Rules:
    """How rows are laid out on every rank."""

    placement: Placement
    direct: bool
    align: int
    overflow: str
    per_node: int = 0  # ranks of each node, where a token travels by nodes

    def padded(self, count: int) -> int:
        return -(-count // self.align) * self.align

    def rows(self, counts: list[int]) -> int:
        """Rows of a rank whose experts get so many."""
        return sum(counts) if self.align == 1 else sum(map(self.padded, counts))

    def level(self, counts: list[int], capacity: int) -> int:
        """The most rows an expert may have so that those of a rank fit its capacity."""
        low, high = 0, max(counts)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.rows([min(count, middle) for count in counts]) <= capacity
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


@dataclass(frozen=True, eq=False)
class Departure:
    """The way of this rank's tokens to their records."""

    there: PermutePlan
    counts: Tensor  # [E] int32, pairs of this rank for every expert
    records: Tensor  # [P] int32, records for every rank
    stops: Tensor  # [N] int32, those that cross the network for every node; empty without nodes


def depart(rules: Rules, indices: Tensor, owners: Tensor) -> Departure:
    """Plan the records of `indices` [T, K] int32, in -1 .. E."""
    experts, world = owners.numel() - 1, len(rules.placement.ranges)
    known = indices.long().remainder(experts + 1)  # -1 is E
    owner = owners[known]  # [T, K], P where dropped
    known = known.masked_fill(owner == world, experts)
    if rules.direct:
        there = permute_plan(known.int(), experts)
        records = _count(owner, world)
        return Departure(there, there.tokens_per_expert, records, records[:0])
    goes, counts = goes_to(owner, world), _count(known, experts)
    if rules.per_node:
        there = plan_copies(goes.unflatten(1, (-1, rules.per_node)).any(2))
        return Departure(there, counts, goes.sum(0, dtype=torch.int32), there.tokens_per_expert)
    there = plan_copies(goes)
    return Departure(there, counts, there.tokens_per_expert, counts[:0])


def goes_to(owner: Tensor, world: int) -> Tensor:
    """[T, P] bool: whether a token has a pair of that owner; `world` in owner [T, K] is nobody."""
    goes = torch.zeros(len(owner), world + 1, dtype=torch.bool, device=owner.device)
    return goes.scatter_(1, owner, True)[:, :world]


def plan_copies(goes: Tensor) -> PermutePlan:
    """A copy of each token for each place that it goes to [T, n], by (place, token)."""
    places = goes.shape[1]
    numbers = torch.arange(places, dtype=torch.int32, device=goes.device)
    return permute_plan(numbers.where(goes, -1), places)


def _count(ids: Tensor, groups: int) -> Tensor:
    """[groups] int32; `groups` itself is a dropped one. Nothing is read on the host."""
    ids = ids.flatten()
    counts = torch.zeros(groups + 1, dtype=torch.int32, device=ids.device)
    return counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))[:groups]


def local_ids(ids: Tensor, experts: range) -> Tensor:
    """[records, K] int32 among the experts of this rank, -1 for those of others."""
    local = ids - experts.start
    return local.masked_fill_((local < 0) | (local >= len(experts)), -1)


def direct_ids(counts: Tensor, device: torch.device) -> Tensor:
    """[records, 1] int32, the local expert of records that come by (source rank, expert).

    `counts` [P, experts of this rank] is on the host.
    """
    ranks, experts = counts.shape
    ids = torch.arange(experts, dtype=torch.int32).repeat(ranks)
    return ids.repeat_interleave(counts.flatten())[:, None].to(device)


def arrive(rules: Rules, ids: Tensor, counts: list[int], capacity: int | None) -> PermutePlan:
    """Plan the rows of this rank: exactly as many as there are, or `capacity`.

    `counts` has the pairs of every local expert. What passes the capacity is dropped: of every
    expert the last rows beyond a level that is the highest to fit.
    """
    rows = rules.rows(counts)
    plan = permute_plan(ids, len(counts), align=rules.align)
    if capacity is not None and rows > capacity:
        level = rules.level(counts, capacity)
        ends = F.pad(plan.offsets, (1, 0))  # with the start of expert 0
        ids = ids.where(plan.row_map < ends[ids.long()] + level, -1)
        plan = permute_plan(ids, len(counts), align=rules.align)
    return shortened(plan, rows if capacity is None else capacity)


def shortened(plan: PermutePlan, rows: int) -> PermutePlan:
    """The plan with so many rows in place of its upper bound."""
    if rows == len(plan.source):
        return plan
    source = plan.source[:rows]
    return plan._replace(source=F.pad(source, (0, rows - len(source)), value=-1))
