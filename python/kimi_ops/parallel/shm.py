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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_ops import _native
from kimi_ops.moe.permute import PermutePlan
from kimi_ops.operators import permute as operators
from kimi_ops.parallel.segment import Layout, Message, Segment
from kimi_ops.parallel.wire import FP8, Form, moves_of

Start = Callable[[Callable[[], Callable[[], Any]]], Callable[[], Any]]


@dataclass(frozen=True)
class Sender:
    """What sends a message: the segment, within the limits of the connection."""

    segment: Segment
    start: Start  # Connection.start

    def __call__(
        self, op: str, layout: Layout, write: Callable[[list[Tensor]], None]
    ) -> Callable[[], Message]:
        """A message under way; the result waits for those of the others."""

        def begin() -> Callable[[], Message]:
            message = self.segment.begin(op, layout)
            if not message.fault:
                write(message.own)
            message.publish()

            def arrived() -> Message:
                message.wait()
                return message

            return arrived

        return self.start(begin)


class Places:
    """Where the records of a route lie in messages."""

    def __init__(self, route: Any, rank: int) -> None:
        self.rank, self.there, self.slots = rank, route.there, route.pairs[1]
        records, self.direct = route.records, route.direct
        self.sent, self.received = route.sent, route.received
        self.tokens = max(route.tokens)  # rows of a rank
        self.leaving = max(map(sum, records))
        self.coming = max(map(sum, zip(*records, strict=True)))
        self._starts = [sum(records[r][:rank]) for r in range(len(records))]  # mine in r's sent
        self.home = self._home(records)

    def _home(self, records: list[list[int]]) -> Tensor:
        """[sent + 1] int32: where the sums of this rank's records lie in a message home; -1."""
        shifts, at = [], 0
        for r, count in enumerate(self.sent):
            before = sum(row[r] for row in records[: self.rank])
            shifts.append(r * self.coming + before - at)
            at += count
        numbers = torch.arange(at + 1, dtype=torch.int32)
        counts = torch.tensor([*self.sent, 1])
        shifts.append(-1 - at)
        return numbers + torch.tensor(shifts, dtype=torch.int32).repeat_interleave(counts)

    def units(self) -> Tensor:
        """[sent] int32: the row (direct: the pair) of each record's token in a message away."""
        source = self.there.source
        if self.direct:
            return source + self.rank * self.tokens * self.slots
        return source.div(len(self.sent), rounding_mode="floor") + self.rank * self.tokens

    def mine(self, field: Tensor) -> Tensor:
        """Those of the entries [P * leaving, 1] that are for this rank."""
        parts = field.view(len(self.sent), -1)
        taken = zip(parts, self._starts, self.received, strict=True)
        return torch.cat([part[start : start + count] for part, start, count in taken]).long()

    def by_record(self) -> Tensor:
        """[received]: the row of each record in a message of a row for each record."""
        numbers = torch.arange(len(self.sent) * self.leaving, dtype=torch.int32)
        return self.mine(numbers)


@dataclass(frozen=True)
class Arrived:
    """The rows of a route as places in a message away, of a row a token."""

    places: Places
    units: Tensor  # [received]
    here: PermutePlan  # over records
    plan: PermutePlan  # over rows of the message

    @classmethod
    def of(cls, places: Places, units: Tensor, here: PermutePlan) -> "Arrived":
        rows = len(places.sent) * places.tokens
        return cls(places, units, here, translated(here, units, rows, places.slots))

    def weights(self, records: Tensor) -> Tensor:
        """[records, K] as [P * rows, K]."""
        whole = records.new_zeros(self.plan.row_map.shape)
        return whole.index_copy_(0, self.units, records)


def translated(here: PermutePlan, units: Tensor, rows: int, slots: int) -> PermutePlan:
    """The plan of records as one of `rows` rows with `slots` each, where record i is unit i."""
    width = here.row_map.shape[1]
    row_map = here.row_map.new_full((rows * slots // width, width), -1)
    row_map.index_copy_(0, units, here.row_map)
    if not len(units):
        return here._replace(row_map=row_map.view(rows, slots))
    record = here.source.div(width, rounding_mode="floor")
    source = units[record.clamp(min=0)] * width + here.source.remainder(width)
    source = source.where(here.source >= 0, -1).int()
    return here._replace(row_map=row_map.view(rows, slots), source=source)


class Pulls:
    """The `Motions` of ranks that share their memory."""

    def __init__(self, segment: Segment, start: Start) -> None:
        self._send = Sender(segment, start)
        self._rank = segment.rank

    def away(
        self, op: str, route: Any, form: Form, back: Form, tokens: Sequence[Tensor],
        weights: Tensor | None, ids: Tensor | None,
    ) -> "Leaving":  # fmt: skip
        known = route.arrived  # of an earlier dispatch
        places = known.places if known else Places(route, self._rank)
        trip = Trip(self._send, op, form, back)
        return Leaving(trip, places, known, tokens, weights, ids)

    def home(
        self, op: str, route: Any, form: Form, tie: Tensor, out: Tensor, here: Tensor | None,
        there: Tensor | None,
    ) -> Callable[[], Tensor]:  # fmt: skip
        trip = Trip(self._send, op, form, form)
        with torch.no_grad():
            arrival = trip.send_home(route.arrived, out, here)
        return lambda: _Home.apply(trip, route.arrived, arrival, tie, here, there, out)


@dataclass(frozen=True)
class Trip:
    """How rows go in one direction, and their gradients in the other."""

    send: Sender
    op: str
    form: Form
    back: Form

    def reversed(self) -> "Trip":
        return Trip(self.send, f"the gradient of {self.op}", self.back, self.form)

    @property
    def plain(self) -> bool:
        """Whether rows can be added where they lie."""
        return self.form.wire == self.form.dtype and self.form.dtype in _native.DTYPES

    def layout(self, rows: int) -> list[tuple[int, int, torch.dtype]]:
        return [(rows, columns, dtype) for columns, dtype in self.form.fields]

    def write(self, own: Sequence[Tensor], tokens: Sequence[Tensor]) -> None:
        encoded = self.form.encode(*tokens) if self.form.wire == FP8 else tokens
        for place, field in zip(own, encoded, strict=False):
            place[: len(field)] = field  # rounds to the wire's dtype

    def rows(self, fields: Sequence[Tensor], plan: PermutePlan) -> tuple[Tensor, ...]:
        """What came, in the order of the plan."""
        moves = moves_of(fields[0].dtype)
        taken = [moves.permute(field, plan) for field in fields[: len(self.form.fields)]]
        return self.form.decode(taken)

    def send_home(
        self, arrived: Arrived, out: Tensor, weights: Tensor | None, beside: Tensor | None = None
    ) -> Callable[[], Message]:
        """Send the sums of rows [R, H] (none where H = 0), and `beside` [records, K]."""
        here, count = arrived.here, len(arrived.units)
        layout = self.layout(arrived.places.coming) if self.form.hidden else []
        if beside is not None:
            layout.append((arrived.places.coming, beside.shape[1], beside.dtype))

        def write(own: list[Tensor]) -> None:
            if beside is not None:
                own[-1][:count] = beside
            if self.form.hidden and self.plain:
                _native._C.unpermute_into(out, here.row_map, weights, own[0][:count])
            elif self.form.hidden:
                self.write(own, [moves_of(out.dtype).unpermute(out, here, weights)])

        return self.send(self.op, layout, write)

    def records(self, field: Tensor, places: Places) -> Tensor:
        """What came home, a row for each record of this rank."""
        return self.form.decode([field.index_select(0, places.home[:-1])])[0]

    def sums(self, field: Tensor, places: Places, weights: Tensor | None) -> Tensor:
        there = places.there
        if not self.plain:
            values = self.records(field, places)
            return moves_of(values.dtype).unpermute(values, there, weights)
        y = field.new_empty(len(there.row_map), field.shape[1])
        row_map = places.home[there.row_map]  # -1 is the last of `home`, which is -1
        _native._C.unpermute_into(field, row_map, weights, y)
        return y


class Leaving:
    """Tokens on their way."""

    def __init__(
        self, trip: Trip, places: Places, known: Arrived | None, tokens: Sequence[Tensor],
        weights: Tensor | None, ids: Tensor | None,
    ) -> None:  # fmt: skip
        self._trip, self._places, self._known = trip, places, known
        self._tokens, self._weights, self._ids = tokens, weights, ids
        layout = trip.layout(places.tokens)
        beside = [part for part in (weights, ids) if part is not None]
        layout += [(places.tokens, part.shape[1], part.dtype) for part in beside]
        if known is None:
            layout.append((places.leaving, 1, torch.int32))

        def write(own: list[Tensor]) -> None:
            fields = own[len(trip.form.fields) :]
            for place, part in zip(fields, beside, strict=False):
                place[: len(part)] = part
            if known is None:
                fields[-1][: sum(places.sent), 0] = places.units()
            trip.write(own, tokens)

        with torch.no_grad():
            self._arrival = trip.send(trip.op, layout, write)

    def ids(self) -> Tensor | None:
        self._message = self._arrival()
        fields = self._message.fields
        self._units = self._known.units if self._known else self._places.mine(fields[-1])
        return None if self._ids is None else fields[-2].index_select(0, self._units)

    def finish(self, route: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        if route.arrived is None:
            route.arrived = Arrived.of(self._places, self._units, route.here)
        tie = self._units.new_empty(0, dtype=torch.float32)
        tie, weights, *rows = _Away.apply(
            self._trip, route.arrived, self._message, tie, self._weights, *self._tokens
        )
        return tie, weights, rows


class _Away(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trip: Trip, arrived: Arrived, message: Message, tie: Tensor, weights: Any,
        *tokens: Tensor,
    ) -> tuple[Any, ...]:  # fmt: skip
        ctx.trip, ctx.arrived, ctx.weighted = trip, arrived, weights is not None
        ctx.count = len(tokens)
        rows = trip.rows(message.fields, arrived.plan)
        if ctx.weighted:
            weights = message.fields[len(trip.form.fields)].index_select(0, arrived.units)
        message.release()
        if trip.form.dtype is None:
            ctx.mark_non_differentiable(*rows)
        return (tie.clone(), weights, *rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tie: Tensor, weights: Any, *rows: Tensor) -> tuple[Any, ...]:
        trip, arrived = ctx.trip.reversed(), ctx.arrived
        given = trip.back.dtype is None  # FP8 values have no gradient
        message = trip.send_home(arrived, rows[0], None, weights if ctx.weighted else None)()
        places, tokens = arrived.places, [None] * ctx.count
        if not given:
            tokens[0] = trip.sums(message.fields[0], places, None)
        if ctx.weighted:
            field = message.fields[-1].index_select(0, places.home[:-1])
            weights = moves_of(field.dtype).unpermute(field, places.there)
        message.release()
        return (None, None, None, tie, weights, *tokens)


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trip: Trip, arrived: Arrived, arrival: Callable[[], Message], tie: Tensor,
        here: Any, there: Any, out: Tensor,
    ) -> Tensor:  # fmt: skip
        message, places, values = arrival(), arrived.places, None
        if there is not None and any(ctx.needs_input_grad):
            values = trip.records(message.fields[0], places)
            y = moves_of(values.dtype).unpermute(values, places.there, there)
        else:
            y = trip.sums(message.fields[0], places, there)
        message.release()
        ctx.trip, ctx.arrived = trip, arrived
        ctx.save_for_backward(here, there, values, None if here is None else out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        here, there, values, out = ctx.saved_tensors
        trip, arrived, places = ctx.trip.reversed(), ctx.arrived, ctx.arrived.places
        rows, plan = places.tokens, arrived.plan
        if there is not None:  # each record has a gradient of its own
            dy, there = _backward(dy, values, places.there, there)
            rows = places.leaving
            plan = translated(arrived.here, places.by_record(), len(places.sent) * rows, 1)
        message = trip.send(trip.op, trip.layout(rows), lambda own: trip.write(own, [dy]))()
        if here is None:
            (out,) = trip.rows(message.fields, plan)
        else:
            (field,) = trip.form.decode(message.fields)
            out, whole = _backward(field, out, plan, arrived.weights(here))
            here = whole.index_select(0, arrived.units)
        message.release()
        return (None, None, None, dy.new_empty(0, dtype=torch.float32), here, there, out)


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
