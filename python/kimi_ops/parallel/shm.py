# SPDX-License-Identifier: MIT
"""The `shm` backend: ranks of one host that read each other's tokens where they lie.

    away   every rank writes its tokens once, whoever needs them; then each takes its rows from the
           memory of all, straight into expert order: T H written, R H written
    home   every rank writes the sums of its rows, one for each record; then each adds its own up
           from the memory of all

There is no packing, no buffer to receive and no sorting of what came. Records and their order are
those of the backends that move bytes, and so are all roundings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.moe.permute import PermutePlan
from kimi_ops.operators import permute as operators
from kimi_ops.parallel.blocks import Blocks
from kimi_ops.parallel.journey import Gradients, Journey
from kimi_ops.parallel.segment import Layout, Message, Segment
from kimi_ops.parallel.wire import FP8, Form, moves_of

Start = Callable[[Callable[[], Callable[[], Any]]], Callable[[], Any]]


@dataclass(frozen=True)
class Sender:
    """What sends a message: the segment, within the limits of the connection."""

    segment: Segment
    start: Start  # Connection.start
    blocks: Blocks = field(default_factory=Blocks)  # for results

    def __call__(
        self, op: str, layout: Layout, write: Callable[[list[Tensor]], None]
    ) -> Callable[[], Message]:
        """A message under way; the result waits for those of the others."""

        def begin() -> Callable[[], Message]:
            message = self.segment.begin(op, layout)
            try:
                if not message.fault:
                    write(message.own)
            except BaseException as error:  # the others must not wait for it
                message.fault = f"{type(error).__name__}: {error}"
                raise
            finally:
                message.publish()

            def arrived() -> Message:
                message.wait()
                return message

            return arrived

        return self.start(begin)


class Places:
    """Where the rows of a route lie in messages, as far as a rank has needed to know."""

    def __init__(self, route: Any, rank: int) -> None:
        self._route, self._rank = route, rank
        self.here: PermutePlan = route.here  # over the tokens of all ranks [P * rows, K]
        self.there: PermutePlan = route.there
        self.rows = max(route.tokens)  # of a rank, in a message of its tokens
        self.coming = max(map(sum, zip(*route.records, strict=True)))  # in one of sums

    @cached_property
    def units(self) -> Tensor:
        """[records]: the rows of the tokens that came to this rank (rank_dedup)."""
        return (self._route.ids >= 0).any(1).nonzero()[:, 0]

    @cached_property
    def records(self) -> PermutePlan:
        """The rows of this rank's experts that make the sum of each record."""
        if self._route.direct:
            plan: PermutePlan = self._route.owner.arrived(self._route, None).here
            return plan
        return self.here._replace(row_map=self.of_records(self.here.row_map))

    def of_records(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.units)

    @cached_property
    def home(self) -> Tensor:
        """[sent + 1] int32: where the sums of this rank's records lie in their message; -1."""
        shifts, at = [], 0
        for rank, count in enumerate(self._route.sent):
            before = sum(row[rank] for row in self._route.records[: self._rank])
            shifts.append(rank * self.coming + before - at)
            at += count
        counts = torch.tensor([*self._route.sent, 1])
        steps = torch.tensor([*shifts, -1 - at], dtype=torch.int32).repeat_interleave(counts)
        return steps + torch.arange(at + 1, dtype=torch.int32)


class Pulls:
    """The `Motions` of ranks that share their memory."""

    def __init__(self, segment: Segment, start: Start) -> None:
        self._send = Sender(segment, start)
        self._rank, self._trips = segment.rank, 0

    def _trip(self, op: str, form: Form, back: Form) -> "Trip":
        self._trips += 1
        return Trip(self._send, op, form, back, self._trips)

    def away(
        self, op: str, route: Any, form: Form, back: Form, tokens: Sequence[Tensor],
        weights: Tensor | None, ids: Tensor | None,
    ) -> "Leaving":  # fmt: skip
        trip = self._trip(op, form, back)
        return Leaving(trip, route, self._rank, tokens, weights, ids)

    def home(
        self, op: str, route: Any, form: Form, tie: Tensor, out: Tensor, here: Tensor | None,
        there: Tensor | None,
    ) -> Callable[[], Tensor]:  # fmt: skip
        return _home(self._trip(op, form, form), route.places, tie, out, here, there)


@dataclass(frozen=True)
class Trip:
    """How rows go in one direction, and their gradients in the other."""

    send: Sender
    op: str
    form: Form
    back: Form
    number: int  # the same on all ranks: ranks that wait in different orders mix up gradients

    def reversed(self) -> "Trip":
        op = f"the gradient of {self.op} {self.number}"
        return Trip(self.send, op, self.back, self.form, self.number)

    @property
    def plain(self) -> bool:
        """Whether rows can be added where they lie."""
        return self.form.wire == self.form.dtype and self.form.dtype in _native.DTYPES

    def layout(self, rows: int) -> list[tuple[int, int, torch.dtype]]:
        return [(rows, columns, dtype) for columns, dtype in self.form.fields]

    def write(self, own: Sequence[Tensor], tokens: Sequence[Tensor]) -> None:
        encoded = self.form.encode(*tokens) if self.form.wire == FP8 else tokens
        for place, part in zip(own, encoded, strict=False):
            place[: len(part)] = part  # rounds to the wire's dtype

    def rows(self, fields: Sequence[Tensor], plan: PermutePlan) -> tuple[Tensor, ...]:
        """What came, in the order of the plan."""
        return self.form.decode([self._taken(x, plan) for x in fields[: len(self.form.fields)]])

    def _taken(self, x: Tensor, plan: PermutePlan) -> Tensor:
        if x.dtype == torch.float64:
            return moves_of(x.dtype).permute(x, plan)
        rows = self.send.blocks.empty(len(plan.source), x.shape[1], x.dtype)
        _native._C.permute_into(x, plan.row_map, plan.source, rows)
        return rows

    def send_home(
        self, places: Places, out: Tensor, weights: Tensor | None, beside: Tensor | None = None
    ) -> Callable[[], Message]:
        """Send the sums of rows [R, H] (none where H = 0); weights and `beside` [P * rows, K]."""
        plan = places.records
        layout = self.layout(places.coming) if self.form.hidden else []
        if beside is not None:
            layout.append((places.coming, beside.shape[1], beside.dtype))
        if weights is not None:
            weights = places.of_records(weights)

        def write(own: list[Tensor]) -> None:
            count = len(plan.row_map)
            if beside is not None:
                own[-1][:count] = places.of_records(beside)
            if self.form.hidden and self.plain:
                _native._C.unpermute_into(out, plan.row_map, weights, own[0][:count])
            elif self.form.hidden:
                self.write(own, [moves_of(out.dtype).unpermute(out, plan, weights)])

        return self.send(self.op, layout, write)

    def records(self, sums: Tensor, places: Places) -> Tensor:
        """What came home, a row for each record of this rank."""
        return self.form.decode([sums.index_select(0, places.home[:-1])])[0]

    def sums(self, parts: Tensor, places: Places, weights: Tensor | None) -> Tensor:
        there = places.there
        if not self.plain:
            values = self.records(parts, places)
            return moves_of(values.dtype).unpermute(values, there, weights)
        y = self.send.blocks.empty(len(there.row_map), parts.shape[1], parts.dtype)
        row_map = places.home[there.row_map]  # -1 is the last of `home`, which is -1
        _native._C.unpermute_into(parts, row_map, weights, y)
        return y


class Leaving:
    """Tokens on their way."""

    def __init__(
        self, trip: Trip, route: Any, rank: int, tokens: Sequence[Tensor], weights: Tensor | None,
        ids: Tensor | None,
    ) -> None:  # fmt: skip
        self._trip, self._rank = trip, rank
        self._with_ids, self._weighted = ids is not None, weights is not None
        rows = max(route.tokens)
        beside = [part for part in (weights, ids) if part is not None]
        layout = trip.layout(rows) + [(rows, part.shape[1], part.dtype) for part in beside]

        def write(own: list[Tensor]) -> None:
            for place, part in zip(own[-len(beside) :], beside, strict=False):
                place[: len(part)] = part
            if ids is not None and len(ids) < rows:
                own[-1][len(ids) :] = -1
            trip.write(own, tokens)

        self._journey = Journey(
            trip.op, lambda: trip.send(trip.op, layout, write), torch.empty(0), weights, *tokens
        )

    def ids(self) -> Tensor | None:
        self._message = self._journey.wait()
        return self._message.fields[-1] if self._with_ids else None

    def finish(self, route: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        if self._with_ids:
            route.places = Places(replace(route), self._rank)  # of a copy: not in a circle
        trip, places, message, weighted = self._trip, route.places, self._message, self._weighted

        def outputs(wanted: bool) -> tuple[list[Tensor | None], list[Tensor]]:
            rows = trip.rows(message.fields, places.here)
            weights = message.fields[len(trip.form.fields)].clone() if weighted else None
            message.release()
            return [weights, *rows], []

        back = partial(_away_back, trip.reversed(), places, weighted)
        tie, weights, *rows = self._journey.arrive(outputs, back, constant=trip.form.dtype is None)
        return tie, weights, rows


def _away_back(
    trip: Trip, places: Places, weighted: bool, kept: Any, gradients: Sequence[Tensor]
) -> Callable[[], Gradients]:
    """The gradients of weights and tokens come home."""
    weights, *rows = gradients
    arrival = trip.send_home(places, rows[0], None, weights if weighted else None)

    def home() -> Gradients:
        message, weights = arrival(), None
        tokens: list[Tensor | None] = [None] * len(rows)
        if trip.form.hidden:  # FP8 values have no gradient
            tokens[0] = trip.sums(message.fields[0], places, None)
        if weighted:
            sums = message.fields[-1].index_select(0, places.home[:-1])
            weights = moves_of(sums.dtype).unpermute(sums, places.there)
        message.release()
        return [weights, *tokens]

    return home


def _home(
    trip: Trip, places: Places, tie: Tensor, out: Tensor, here: Tensor | None, there: Tensor | None
) -> Callable[[], Tensor]:
    """Send the sums of rows home; the result gives those of tokens."""
    journey = Journey(trip.op, lambda: trip.send_home(places, out, here), tie, out, here, there)

    def outputs(wanted: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        message, values = journey.wait(), None
        if there is not None and wanted:
            values = trip.records(message.fields[0], places)
            y = moves_of(values.dtype).unpermute(values, places.there, there)
        else:
            y = trip.sums(message.fields[0], places, there)
        message.release()
        return [y], [here, there, values, None if here is None else out]

    return lambda: journey.arrive(outputs, partial(_home_back, trip.reversed(), places))[1]


def _home_back(
    trip: Trip, places: Places, kept: Sequence[Any], gradients: Sequence[Tensor]
) -> Callable[[], Gradients]:
    """The gradients of rows go the way of their tokens."""
    here, there, values, out = kept
    (dy,), plan, rows = gradients, places.here, places.rows
    if there is not None:  # each pair has a gradient of its own
        sorted_dy, there = _backward(dy, values, places.there, there)
        rows *= plan.row_map.shape[1]
        plan = plan._replace(row_map=plan.row_map.view(-1, 1))
        dy = values.new_zeros(rows, values.shape[1])
        dy.index_copy_(0, places.there.source.long(), sorted_dy)
    arrival = trip.send(trip.op, trip.layout(rows), lambda own: trip.write(own, [dy]))

    def there_again() -> Gradients:
        message = arrival()
        if here is None:
            (grads,), weights = trip.rows(message.fields, plan), None
        else:
            (dy,) = trip.form.decode(message.fields)
            grads, weights = _backward(dy, out, plan, here)
        message.release()
        return [grads, weights, there]

    return there_again


def _backward(grad: Tensor, y: Tensor, plan: PermutePlan, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of unpermute in y and the weights."""
    if y.dtype in _native.DTYPES:
        grads = operators.unpermute_backward(grad, y, plan.row_map, plan.source, weights)
        return grads
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in (y, weights)]
        sums = moves_of(y.dtype).unpermute(leaves[0], plan, leaves[1])
        dy, dw = torch.autograd.grad(sums, leaves, grad)
    return dy, dw
