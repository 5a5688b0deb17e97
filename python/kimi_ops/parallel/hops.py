# SPDX-License-Identifier: MIT
"""Two hops: between nodes a token travels once for each node, however many of its ranks need it.

    away   rank l of a node --rail--> rank l of each node of the token --node--> ranks of the token
    home   the sums of a node's ranks --node--> added up in their order --rail--> home

A rail joins the ranks of one number in all nodes. What a rank hands on it copies, or adds up, as it
lies on the wire: sums of a node are rounded to the wire's dtype once. Records end in the order of
their ranks, as without nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kimi_ops.moe.permute import PermutePlan
from kimi_ops.parallel.layout import goes_to, plan_copies, shortened
from kimi_ops.parallel.transport import Transport
from kimi_ops.parallel.wire import Arrival, Field, Form, moves_of, pack, unpack


@dataclass(eq=False)
class Relay:
    """What this rank sends, hands on and gets, of one dispatch: numbers of records."""

    rail_sent: list[int]  # to each node
    rail_received: list[int]
    handed: list[int]  # what came by rail, to each rank of this node
    arriving: list[int]  # from each rank of this node
    order: Tensor  # [arriving] int64: where records, by rank, lie among those that arrive
    owners: Tensor  # [E + 1] int64: which rank of this node, as many as there are for others
    plan: PermutePlan | None = None  # [rail_received, ranks of the node] to what is handed on

    @staticmethod
    def of(records: Tensor, stops: Tensor, rank: int, owners: Tensor) -> "Relay":
        """From the records [P, P] and stops [P, N] of all ranks; `owners` are members."""
        per_node = len(records) // stops.shape[1]
        node, rail = divmod(rank, per_node)
        first = node * per_node
        by_node = records.unflatten(0, (-1, per_node))  # [N, per_node, P]
        mine = by_node[:, :, rank]
        arrival, counts = mine.t().flatten(), mine.flatten()  # by (rail, node), by rank
        starts = (arrival.cumsum(0) - arrival).view(per_node, -1).t().flatten()
        shifts = starts - (counts.cumsum(0) - counts)
        order = torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)
        local = owners - first
        others = (local < 0) | (local >= per_node)
        return Relay(
            stops[rank].tolist(),
            stops[rail::per_node, node].tolist(),
            by_node[:, rail, first : first + per_node].sum(0).tolist(),
            mine.sum(0).tolist(),
            order.to(owners.device),
            local.masked_fill(others, per_node),
        )

    def plan_with(self, ids: Tensor) -> None:
        """Plan what is handed on of tokens with `ids` [rail_received, K]."""
        owner = self.owners[ids.long().remainder(len(self.owners))]
        plan = plan_copies(goes_to(owner, len(self.handed)))
        self.plan = shortened(plan, sum(self.handed))

    @cached_property
    def copies(self) -> Tensor:
        """[handed]: which record of the rail each is a copy of."""
        assert self.plan is not None
        return self.plan.source.long() // len(self.handed)

    @cached_property
    def by_arrival(self) -> Tensor:
        return self.order.argsort()


@dataclass
class Hops:
    """The two connections of a rank, and who starts an exchange."""

    rail: Transport
    node: Transport
    start: Callable[[Callable[[], Callable[[], Any]]], Callable[[], Any]]
    _turns: list["Turn"] = field(default_factory=list)

    def way(self, route: Any, form: Form, back: Form) -> "Relayed":
        return Relayed(self, route.relay, True, form, back)

    def before(self, away: bool) -> None:
        """Before a first hop: where it takes the way of earlier second hops, they go first.

        So both connections see operations in the order in which they begin, on every rank,
        whatever is waited for first.
        """
        if self._turns and self._turns[0].away != away:
            self._hand_on_to(self._turns[-1])

    def in_turn(
        self, away: bool, hand_on: Callable[[], Callable[[], Tensor]]
    ) -> Callable[[], Tensor]:
        """The result starts a second hop, behind those of earlier operations, and waits for it."""
        turn = Turn(away, hand_on)
        self._turns.append(turn)

        def arrived() -> Tensor:
            self._hand_on_to(turn)
            return turn.wait()

        return arrived

    def _hand_on_to(self, turn: "Turn") -> None:
        while turn in self._turns:
            earlier = self._turns.pop(0)
            earlier.wait = earlier.hand_on()


@dataclass(eq=False)
class Turn:
    away: bool
    hand_on: Callable[[], Callable[[], Tensor]]
    wait: Any = None  # once it was handed on


@dataclass(frozen=True)
class Relayed:
    """Both hops of one exchange, away or home; a `Way` of records."""

    hops: Hops
    relay: Relay
    away: bool
    form: Form
    back: Form

    @property
    def sent(self) -> list[int]:
        return self.relay.rail_sent if self.away else self.relay.arriving

    def reversed(self) -> "Relayed":
        return replace(self, away=not self.away, form=self.back, back=self.form)

    def start(self, tokens: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> Arrival:
        fields = [*self.form.encode(*tokens), *beside]
        kinds = [(each.shape[1], each.dtype) for each in fields]
        go = self._go_away if self.away else self._go_home
        arrived = self.hops.start(lambda: go(pack(fields), kinds))
        return lambda: unpack(arrived(), kinds)

    def _go_away(self, records: Tensor, kinds: list[Field]) -> Callable[[], Tensor]:
        relay, hops = self.relay, self.hops
        hops.before(away=True)
        came = _exchange(hops.rail, records, relay.rail_sent, relay.rail_received)

        def hand_on() -> Callable[[], Tensor]:
            tokens = came()
            if relay.plan is None:
                relay.plan_with(unpack(tokens, kinds)[-1])
            copies = tokens.index_select(0, relay.copies)
            return _exchange(hops.node, copies, relay.handed, relay.arriving)

        arrived = hops.in_turn(True, hand_on)
        return lambda: arrived().index_select(0, relay.order)

    def _go_home(self, records: Tensor, kinds: list[Field]) -> Callable[[], Tensor]:
        relay, hops = self.relay, self.hops
        hops.before(away=False)
        records = records.index_select(0, relay.by_arrival)
        came = _exchange(hops.node, records, relay.arriving, relay.handed)

        def hand_on() -> Callable[[], Tensor]:
            parts = unpack(came(), kinds)
            sums = pack([moves_of(part.dtype).unpermute(part, relay.plan) for part in parts])
            return _exchange(hops.rail, sums, relay.rail_received, relay.rail_sent)

        return hops.in_turn(False, hand_on)


def _exchange(
    transport: Transport, records: Tensor, sent: list[int], received: list[int]
) -> Callable[[], Tensor]:
    """Records [N, bytes] of all ranks of the transport."""
    size, total = records.shape[1], sum(received)
    sizes = ([count * size for count in counts] for counts in (sent, received))
    arrived = transport.start(records.flatten(), *sizes)
    return lambda: arrived().view(total, size)
