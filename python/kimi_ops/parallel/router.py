# SPDX-License-Identifier: MIT
"""The route of a dispatch: what leaves for which rank, what arrives, and whether it fits."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kimi_ops.moe.permute import PermutePlan
from kimi_ops.parallel import call_checks, messages, transport
from kimi_ops.parallel.connection import Connection
from kimi_ops.parallel.errors import EPOverflow, named
from kimi_ops.parallel.hops import Relay
from kimi_ops.parallel.layout import Rules, arrive, depart, direct_ids, local_ids, shortened
from kimi_ops.parallel.results import Route
from kimi_ops.routing import as_int32


@dataclass
class Router:
    """Plans routes; `capacity` may grow."""

    connection: Connection
    rules: Rules
    capacity: int | None

    def __post_init__(self) -> None:
        self.owners = self.rules.placement.owners(self.connection.device)
        self.experts = self.rules.placement.ranges[self.connection.rank]

    def meet(self, limits: call_checks.Limits, x: Any, indices: Any, weights: Any) -> Route:
        """Check the arguments, plan what leaves, tell everybody, and hear what will arrive."""
        with self.connection.numbered():
            return self._meet(limits, x, indices, weights)

    def _meet(self, limits: call_checks.Limits, x: Any, indices: Any, weights: Any) -> Route:
        fixed = self.capacity is not None and self.rules.overflow != "grow"
        if fixed and self.connection.lays_rows_out:
            return self._unasked(limits, x, indices, weights)
        if transport.capturing():
            raise ValueError(
                "dispatch: overflow: expected 'drop' or 'raise' with a capacity and backend='cuda' "
                f"while a graph is captured, got {self.rules.overflow!r} with capacity="
                f"{self.capacity} and {self.connection.transport.name}; the host has to ask for "
                "the number of rows"
            )
        experts, world = len(self.owners) - 1, self.connection.world
        nodes = world // self.rules.per_node if self.rules.per_node else 0
        head, fault = [0] * len(call_checks.AGREED), None
        counts = torch.zeros(experts + world + nodes, dtype=torch.int64)
        try:
            head = call_checks.dispatch(limits, x, indices, weights)
            leaving = depart(self.rules, as_int32(indices), self.owners)
            counts = torch.cat([leaving.counts, leaving.records, leaving.stops]).long()
        except Exception as error:  # whatever it is, the others must not wait for this rank
            fault = error
        tokens = 0 if fault else len(indices)
        words = torch.tensor([int(fault is not None), tokens, *head])
        heads, loads, records, stops = self.connection.gather(
            [words, counts], [len(words), experts, world, nodes]
        )
        wrong, tokens, *agreed = heads.t().tolist()
        if any(wrong):
            self.connection.raise_faults("dispatch", fault)
        for name, values in zip(call_checks.AGREED, agreed, strict=True):
            messages.agree("dispatch", name, call_checks.readable(name, values))
        dropped, rank, counted = self._fit(loads), self.connection.rank, records.tolist()
        sent, received, relay = counted[rank], [row[rank] for row in counted], None
        if nodes:
            relay = Relay.of(records, stops, rank, self.owners)
            sent, received = relay.rail_sent, relay.rail_received
        there = shortened(leaving.there, sum(sent))
        pairs = (len(indices), indices.shape[1])
        return Route(
            self, pairs, self.rules.direct, there, there, tokens, counted, sent, received,
            loads.int(), dropped, relay=relay,
        )  # fmt: skip

    def _unasked(self, limits: call_checks.Limits, x: Any, indices: Any, weights: Any) -> Route:
        """The route of a dispatch whose counts the host need not know: the backend fills it in."""
        call_checks.dispatch(limits, x, indices, weights)
        world, experts = self.connection.world, len(self.owners) - 1
        unknown = PermutePlan(*(indices.new_empty(0) for _ in PermutePlan._fields))
        tokens, loads = [limits.max_tokens] * world, indices.new_empty(world, experts)
        pairs = (len(indices), indices.shape[1])
        return Route(self, pairs, self.rules.direct, unknown, unknown, tokens, [], [], [], loads, 0)

    def arrived(self, route: Route, ids: Tensor | None) -> Route:
        """The route with the plan of the rows that came, unless the backend has made it."""
        if route.places is not None:
            return route
        mine = route.loads[:, self.experts.start : self.experts.stop]
        if ids is None:
            ids = direct_ids(mine, self.connection.device)
        else:
            ids = local_ids(ids, self.experts)
        here = arrive(self.rules, ids, mine.sum(0).tolist(), self.capacity)
        return replace(route, here=here, ids=ids)

    def _fit(self, loads: Tensor) -> int:
        """Compare all ranks' rows with the capacity; the pairs that this rank drops."""
        if self.capacity is None:
            return 0
        sums, rules = loads.sum(0), self.rules
        counts = [sums[owned.start : owned.stop].tolist() for owned in rules.placement.ranges]
        rows = [rules.rows(each) for each in counts]
        over = [rank for rank, count in enumerate(rows) if count > self.capacity]
        if over and rules.overflow == "raise":
            raise EPOverflow(
                f"dispatch: capacity: expected at most {self.capacity} rows a rank, "
                f"{named(over)} would get {', '.join(str(rows[rank]) for rank in over)}; raise it, "
                "or pass overflow='drop' or 'grow'",
                over,
                max(rows),
            )
        if over and rules.overflow == "grow":
            self.capacity *= -(-max(rows) // self.capacity)
        mine = counts[self.connection.rank]
        level = rules.level(mine, self.capacity)
        return sum(max(0, count - level) for count in mine)
