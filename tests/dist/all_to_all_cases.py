# SPDX-License-Identifier: MIT
"""Random dispatches, and what the oracle makes of them."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from kimi_ops import ExpertParallel, LocalWorld
from kimi_ops.parallel import EPMisuse, EPRankLost
from kimi_ops.reference import all_to_all as oracle

HIDDEN = (1, 8, 130)
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
WIRES = (None, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
CAPACITIES = ((None, "raise"), (12, "drop"), (3, "grow"), (200, "raise"))


@dataclass
class Case:
    experts: int
    layout: str
    wire: torch.dtype | None
    align: int
    capacity: int | None
    overflow: str
    x: list[Tensor]
    indices: list[Tensor]
    weights: list[Tensor] | None
    per_node: int | None = None

    @property
    def world(self) -> int:
        return len(self.x)

    @property
    def options(self) -> dict[str, Any]:
        """Of an ExpertParallel."""
        return {
            "num_experts": self.experts,
            "hidden": self.x[0].shape[1],
            "max_tokens_per_rank": 16,
            "layout": self.layout,
            "wire_dtype": self.wire,
            "expert_alignment": self.align,
            "capacity": self.capacity,
            "overflow": self.overflow,
            "ranks_per_node": self.per_node,
        }

    def received(self) -> list[oracle.Received]:
        return oracle.dispatch(
            self.x,
            self.indices,
            self.experts,
            expert_alignment=self.align,
            capacity=self.capacity,
            overflow=self.overflow,
            wire_dtype=self.wire,
        )

    def combined(self, outs: list[Tensor], received: list[oracle.Received]) -> list[Tensor]:
        return oracle.combine(
            outs, received, self.indices, self.weights, layout=self.layout, wire_dtype=self.wire,
            ranks_per_node=self.per_node,
        )  # fmt: skip


def random_case(seed: int, world: int | None = None, **fixed: Any) -> Case:
    """Uneven and absent tokens, hot experts, dropped ids of both kinds, odd shapes."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    world = world or choose.choice((1, 2, 3, 4, 8))
    experts, slots = choose.randint(world, 3 * world + 2), choose.randint(1, 4)
    hidden, dtype = choose.choice(HIDDEN), choose.choice(DTYPES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = [choose.choice((0, 1, 5, 9)) for _ in range(world)]
    hot = choose.random() < 0.3
    capacity, overflow = choose.choice(CAPACITIES)

    def ids(count: int) -> Tensor:
        highest = min(experts, 2) if hot else experts + 1
        return torch.randint(-1, highest, (count, slots), generator=generator, dtype=torch.int32)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    case = Case(
        experts,
        choose.choice(("rank_dedup", "expert_direct")),
        choose.choice(WIRES),
        choose.choice((1, 1, 4)),
        capacity,
        overflow,
        [values(count, hidden).to(dtype) for count in tokens],
        [ids(count) for count in tokens],
        [values(count, slots).to(wide) for count in tokens] if choose.random() < 0.7 else None,
    )
    for name, value in fixed.items():
        setattr(case, name, value)
    return case


def check(
    case: Case, group: Any, rank: int, expert: Callable[[Tensor], Tensor], backend: str = "auto"
) -> None:
    """One rank's dispatch, combine and repeated dispatch against the oracle, bit for bit."""
    received = case.received()
    outs = [expert(rows.x) for rows in received]
    with ExpertParallel(group, backend=backend, **case.options) as ep:
        weights = None if case.weights is None else case.weights[rank]
        given = ep.dispatch(case.x[rank], case.indices[rank], weights)
        for _ in range(2):
            want = received[rank]
            assert torch.equal(given.x, want.x)
            assert torch.equal(given.offsets, want.offsets)
            assert torch.equal(given.tokens_per_expert, want.tokens_per_expert)
            assert given.handle.dropped == want.dropped
            assert int(given.handle.loads[rank].sum()) == int(
                ((case.indices[rank] >= 0) & (case.indices[rank] < case.experts)).sum()
            )
            y = ep.combine(expert(given.x), given.handle, async_op=True).wait()
            expected = case.combined(outs, received)[rank]
            assert y.dtype == expected.dtype and torch.equal(y, expected)
            given = ep.dispatch(case.x[rank], weights=weights, handle=given.handle)


def without(case: Case, lost: set[int]) -> Case:
    """The case as it is where those ranks bring nothing and their experts get nothing."""
    small, more = divmod(case.experts, case.world)
    owners = [rank for rank in range(case.world) for _ in range(small + (rank < more))]
    gone = torch.tensor([*(owner in lost for owner in owners), False])

    def kept(ids: Tensor) -> Tensor:
        return ids.masked_fill(gone[ids.long().remainder(case.experts + 1)], -1)

    x = [t[:0] if rank in lost else t for rank, t in enumerate(case.x)]
    ids = [t[:0] if rank in lost else kept(t) for rank, t in enumerate(case.indices)]
    weights = case.weights and [t[: len(i)] for t, i in zip(case.weights, ids, strict=True)]
    return replace(case, x=x, indices=ids, weights=weights)


def check_without(case: Case, lost: set[int], mask: Callable[[ExpertParallel], None]) -> None:
    """Ranks of a `LocalWorld` that are lost, and masked by `mask`: the rest has the oracle's bits
    of `without`."""
    rest = without(case, lost)
    received = rest.received()
    combined = rest.combined([triple(rows.x) for rows in received], received)

    def work(group: Any) -> None:
        with ExpertParallel(group, **case.options) as ep:
            if group.rank in lost:
                return
            x, ids = case.x[group.rank], case.indices[group.rank]
            with pytest.raises(EPRankLost) as caught:
                ep.dispatch(x, ids)
            assert set(caught.value.ranks) <= lost
            mask(ep)
            rows = ep.dispatch(x, ids, case.weights and case.weights[group.rank])
            want = received[group.rank]
            assert torch.equal(rows.x, want.x) and torch.equal(rows.offsets, want.offsets)
            assert rows.handle.dropped == want.dropped
            assert torch.equal(ep.combine(triple(rows.x), rows.handle), combined[group.rank])

    LocalWorld(case.world).run(work)


def survive(rank: int, backend: str) -> NoReturn:
    """One of 3 processes of the default group, of which rank 1 ends between two layers."""
    sizes = {"num_experts": 6, "hidden": 2, "max_tokens_per_rank": 8, "timeout": 20.0}
    ep = ExpertParallel(backend=backend, **sizes)
    ids, x = torch.arange(6).view(1, 6), torch.full((1, 2), 1.0 + rank)
    rows = ep.dispatch(x, ids)
    ep.combine(rows.x, rows.handle)
    if rank == 1:
        os._exit(0)
    with pytest.raises(EPRankLost) as caught:
        ep.dispatch(x, ids)
    assert caught.value.ranks == (1,), str(caught.value)
    ep.mask_rank(*caught.value.ranks)
    with pytest.raises(EPMisuse, match="expected one of this ExpertParallel"):
        ep.combine(rows.x, rows.handle)
    for _ in range(3):
        rows = ep.dispatch(x, ids)
        assert rows.x[:, 0].tolist() == [1.0, 3.0] * 2 and ep.backend == backend
        assert ep.combine(rows.x, rows.handle)[0].tolist() == [4.0 * (1 + rank)] * 2
    ep.close()
    os._exit(0)  # the default group has lost a rank: nobody can end it in order


def triple(x: Tensor) -> Tensor:
    """An expert whose results are rounded."""
    return (x * 3).to(x.dtype)
