# SPDX-License-Identifier: MIT
"""Random dispatches, and what the oracle makes of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_ops import ExpertParallel
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


def triple(x: Tensor) -> Tensor:
    """An expert whose results are rounded."""
    return (x * 3).to(x.dtype)
