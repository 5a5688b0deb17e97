# SPDX-License-Identifier: MIT
"""The `cuda` backend: ranks on GPUs that reach each other's memory (kernels in csrc/all_to_all).

    away   a dispatch: tokens are put into the own buffer and pulled by who needs them; a gradient
           that goes the same way is a dispatch by the same layout
    home   a combine: sums are pushed to the token's home and added up there

The kernels lay rows out by themselves; the counts, which `Router.meet` has told all ranks, say how
many there are. Weights' gradients are few: they go home as rows of K columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.moe.permute import PermutePlan, permute_plan
from kimi_ops.operators import permute as operators
from kimi_ops.parallel import transport as links
from kimi_ops.parallel.errors import EPMismatch, EPOverflow, EPTimeout, named
from kimi_ops.parallel.journey import Gradients, Journey
from kimi_ops.parallel.local import LocalTransport
from kimi_ops.parallel.peer_memory import PeerMemory
from kimi_ops.parallel.peer_transport import PeerTransport, Roles, Together
from kimi_ops.parallel.side_stream import beside
from kimi_ops.parallel.wire import Form

MAX_TOP_K = 32
SEND, MEET, RECEIVE = 1, 2, 4
WEIGHTS = Form(0, torch.float32, torch.float32)  # how their gradients travel
# Up to so many tokens of all ranks one launch, above them one for each phase, of which one block
# waits. Predicted: 3 launches cost 4 us more, a grid that waits keeps other kernels from its SMs,
# and where these are those of another rank it waits for ever.
_ONE_LAUNCH = 1024

Start = Callable[[Callable[[], Callable[[], Any]]], Callable[[], Any]]


@dataclass(eq=False)
class Places:
    """The layout of a dispatch as the kernels know it."""

    most: int  # S, tokens of a rank
    plan: PermutePlan  # [S P, K] of all ranks' tokens to the rows here
    slots: Tensor  # [S P] int32
    home: Tensor  # [T] int32
    report: Tensor  # [4 + P] int64
    loads: Tensor  # [P, E] int32

    @property
    def rows(self) -> int:
        return len(self.plan.source)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(rows that are no padding, their token * K + slot), both [R] with -1 for padding."""
        source = self.plan.source
        numbers = torch.arange(len(source), dtype=torch.int32, device=source.device)
        return numbers.where(source >= 0, -1), source


class Peers:
    """The `Motions` of ranks on GPUs that reach each other's memory."""

    def __init__(self, transport: PeerTransport, start: Start, buffers: int) -> None:
        self.world, self.start = transport.ranks, start
        self._members = list(transport.members)
        self._at_once = 0 if transport.crowded else _ONE_LAUNCH
        joint = isinstance(transport.launcher, Together)
        self._gradients = not (joint and transport.device.type == "cuda")
        # The streams of one process are few: where each rank needs one, none has a second.
        few = transport.crowded and isinstance(transport.talk, LocalTransport)
        if buffers > 1 and transport.device.type == "cuda" and not few:
            side = torch.cuda.Stream(transport.device)
            self.start = lambda begin: start(lambda: beside(side, begin))
        self._provide, self._launch = transport.provide, transport.launcher
        self._halves, self._timeout = 2 * buffers, int(transport.timeout * 1e9)
        self._memory: PeerMemory | None = None

    def away(
        self, op: str, route: Any, form: Form, back: Form, tokens: Sequence[Tensor],
        weights: Tensor | None, ids: Tensor | None,
    ) -> "Leaving":  # fmt: skip
        if form.wire == torch.float64 or route.pairs[1] > MAX_TOP_K:
            raise TypeError(
                f"{op}: x: expected a dtype of at most 32 bits and K up to {MAX_TOP_K}, got "
                f"{form.wire} and K = {route.pairs[1]}; the backend cuda has kernels for those"
            )
        self._refuse_gradients(op, *tokens, weights)
        return Leaving(Trip(self, op, form, back), route, tokens, weights, ids)

    def home(
        self, op: str, route: Any, form: Form, tie: Tensor, out: Tensor, here: Tensor | None,
        there: Tensor | None,
    ) -> Callable[[], Tensor]:  # fmt: skip
        self._refuse_gradients(op, out, here, there)
        trip = Trip(self, op, form, form)

        def begin() -> Callable[[], Tensor]:
            return self.start(lambda: trip.push(route, out, there if route.direct else here))

        journey = Journey(op, begin, tie, out, here, there)

        def outputs(wanted: bool) -> tuple[list[Tensor], list[Tensor | None]]:
            return [journey.wait()], [here, there, None if here is there is None else out]

        return lambda: journey.arrive(outputs, partial(_home_back, trip.reversed(), route))[1]

    def _refuse_gradients(self, op: str, *given: Tensor | None) -> None:
        wanted = any(tensor is not None and tensor.requires_grad for tensor in given)
        if wanted and torch.is_grad_enabled() and not self._gradients:
            raise ValueError(
                f"{op}: expected no gradients wanted in a LocalWorld on a GPU, got tensors that "
                "want them; autograd runs the backward of all ranks in one thread: pass "
                "LocalWorld(size, streams=True), or call it in torch.no_grad()"
            )

    def run(self, op: str, bytes: int, numbers: Sequence[Any], roles: Roles, jobs: int) -> None:
        """Launch an operation; `bytes` of buffer, `jobs` tokens of all ranks."""
        memory = self._reserve(op, bytes)
        head = [memory.bytes, self._timeout, self._halves]
        phases = [SEND | MEET | RECEIVE] if jobs <= self._at_once else [SEND, MEET, RECEIVE]
        for phase in phases:
            self._launch(op, memory, [[*head, *numbers[0], phase], *numbers[1:]], roles)
        self._check(op, memory)

    def bytes_of(self, most: int, row: int, beside: int, top_k: int, route: Any, form: Form) -> int:
        """Bytes of a buffer for a dispatch of such rows, and for a combine in `form`."""
        wide = form.wire == torch.float32
        experts, hidden = route.loads.shape[1], max(form.hidden, 1)
        return int(
            _native.engine.all_to_all_buffer_bytes(
                self.world, self._halves, most, row, beside, experts, top_k, route.direct, hidden,
                wide,
            )
        )  # fmt: skip

    def _reserve(self, op: str, bytes: int) -> PeerMemory:
        """The memory, made anew where it is too small: on all ranks, since all ask for the same."""
        if self._memory is None or self._memory.bytes < bytes:
            if links.capturing():
                raise ValueError(
                    f"{op}: expected memory for the peers before a graph is captured, got "
                    f"{self._memory.bytes if self._memory else 0} bytes of {bytes}; dispatch and "
                    "combine once with these shapes first"
                )
            old, self._memory = self._memory, self._provide(bytes)
            if old is not None:
                self._memory.state.copy_(old.state)  # epochs go on
        return self._memory

    def check(self, op: str) -> None:
        """Wait, and raise for what kernels have found."""
        if self._memory is not None:
            self._check(op, self._memory, wait=True)

    def _check(self, op: str, memory: PeerMemory, wait: bool = False) -> None:
        """Raise for what kernels have found, as far as is known."""
        found = memory.faults(wait)
        if found.silent:
            seconds = self._timeout / 1e9
            told = f"{op}: {named(found.silent)} did not come within {seconds:g} s"
            raise EPTimeout(told, found.silent)
        if found.strange:
            raise EPMismatch(f"{op}: {named(found.strange)} made another call", found.strange)
        if found.overfull:
            raise EPOverflow(
                f"{op}: capacity: expected room for all rows, {named(found.overfull)} would have "
                f"got up to {found.most}; raise it, or pass overflow='drop'",
                found.overfull,
                found.most,
            )

    def loads(self, places: Places) -> Tensor:
        """[P, E] of the ranks that are left."""
        whole = len(self._members) == self.world
        return places.loads if whole else places.loads[self._members]


@dataclass(frozen=True)
class Trip:
    """How rows go in one direction, and their gradients in the other."""

    peers: Peers
    op: str
    form: Form
    back: Form

    def reversed(self) -> "Trip":
        return Trip(self.peers, f"the gradient of {self.op}", self.back, self.form)

    def pull(
        self, route: Any, tokens: Sequence[Tensor], weights: Tensor | None, ids: Tensor | None
    ) -> Callable[[], "Pulled"]:
        """Dispatch tokens [T, *]; without ids by the places of the route."""
        peers, most = self.peers, max(1, *route.tokens)
        fields = [field.contiguous() for field in self.form.encode(*tokens)]
        x, beside = fields[0], fields[1] if len(fields) > 1 else None
        (count, top_k), experts = route.pairs, route.loads.shape[1]
        units = peers.world * most

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        plan = None if ids is None else permute_plan(ids, experts)
        if plan is None:
            places = route.places
        else:
            owner, own = route.owner, len(route.owner.experts)
            rows = owner.capacity
            if rows is None:
                mine = route.loads[:, owner.experts.start : owner.experts.stop]
                rows = owner.rules.rows(mine.sum(0).tolist())
            here = PermutePlan(new(units, top_k), new(rows), new(own), new(own))
            places = Places(
                most, here, new(units), new(count), new(4 + peers.world, dtype=torch.int64),
                new(peers.world, experts),
            )  # fmt: skip
        here = places.plan
        rows = [new(places.rows, *field.shape[1:], dtype=field.dtype) for field in fields]
        y_weights = None if weights is None else new(units, top_k, dtype=torch.float32)
        roles: Roles = {
            "x": x, "beside": beside, "indices": ids,
            "row_map": None if plan is None else plan.row_map,
            "offsets": None if plan is None else plan.offsets,
            "counts": None if plan is None else plan.tokens_per_expert,
            "weights": weights, "y": rows[0], "y_beside": rows[1] if len(rows) > 1 else None,
            "y_weights": y_weights, "y_row_map": here.row_map, "y_source": here.source,
            "y_slots": places.slots, "home": places.home, "y_offsets": here.offsets,
            "y_counts": here.tokens_per_expert,
            "loads": None if plan is None else places.loads, "report": places.report,
        }  # fmt: skip
        row, side = x.shape[1] * x.itemsize, 0 if beside is None else beside.shape[1] * 4
        # no gradient needs more: ranks do not meet on the host to make memory in a backward
        forms = (self.form, self.back, Form(top_k, torch.float32, torch.float32))
        bytes = max(peers.bytes_of(most, row, side, top_k, route, form) for form in forms)
        rules = route.owner.rules
        strict = plan is not None and rules.overflow == "raise" and route.owner.capacity is not None
        numbers = [most, experts, rules.align, int(route.direct), int(plan is None), int(strict), 0]
        peers.run("all_to_all_dispatch", bytes, [numbers], roles, units)
        pulled = Pulled(places, rows, y_weights)
        return lambda: pulled

    def push(
        self, route: Any, out: Tensor, weights: Tensor | None, lanes: Tensor | None = None
    ) -> Callable[[], Tensor]:
        """Combine rows [R, *]; `lanes` [P S, K] instead of the row map."""
        peers, places = self.peers, route.places
        row_map = places.plan.row_map if lanes is None else lanes
        y = out.new_empty(route.pairs[0], out.shape[1])
        wire = self.form.wire if self.form.wire.itemsize < out.dtype.itemsize else out.dtype
        roles: Roles = {
            "out": out if out.stride(-1) == 1 else out.contiguous(), "row_map": row_map,
            "slots": places.slots, "home": places.home, "report": places.report,
            "weights": weights, "y": y,
            "epoch": torch.empty(1, dtype=torch.int64, device=out.device),
        }  # fmt: skip
        form = Form(out.shape[1], out.dtype, wire)
        bytes = peers.bytes_of(places.most, 1, 0, row_map.shape[1], route, form)
        numbers = [places.most, int(route.direct)]
        peers.run("all_to_all_combine", bytes, [numbers, wire], roles, peers.world * places.most)
        return lambda: y


@dataclass(frozen=True, eq=False)
class Pulled:
    """What a dispatch gave."""

    places: Places
    fields: list[Tensor]
    weights: Tensor | None


class Leaving:
    """Tokens on their way."""

    def __init__(
        self, trip: Trip, route: Any, tokens: Sequence[Tensor], weights: Tensor | None,
        ids: Tensor | None,
    ) -> None:  # fmt: skip
        self._trip, self._route, self._weighted = trip, route, weights is not None

        def begin() -> Callable[[], Pulled]:
            return trip.peers.start(lambda: trip.pull(route, tokens, weights, ids))

        tie = tokens[0].new_empty(0, dtype=torch.float32)
        self._journey = Journey(trip.op, begin, tie, weights, *tokens)

    def ids(self) -> None:
        """Nothing is left to plan with them: the route has the kernels' layout."""
        self._pulled, route = self._journey.wait(), self._route
        if route.places is None:
            places = self._pulled.places
            route.here, route.places = places.plan, places
            route.loads, route.dropped = self._trip.peers.loads(places), places.report[3]

    def finish(self, route: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        trip, pulled = self._trip, self._pulled

        def outputs(wanted: bool) -> tuple[list[Tensor | None], list[Tensor]]:
            return [pulled.weights, *trip.form.decode(pulled.fields)], []

        back = partial(_away_back, trip.reversed(), route, self._weighted)
        tie, weights, *rows = self._journey.arrive(outputs, back, constant=trip.form.dtype is None)
        return tie, weights, rows


def _away_back(
    trip: Trip, route: Any, weighted: bool, kept: Any, gradients: Sequence[Tensor]
) -> Callable[[], Gradients]:
    """The gradients of weights and tokens come home."""
    weights, *rows = gradients
    wait = None
    if trip.form.hidden:  # FP8 values have no gradient
        wait = trip.peers.start(lambda: trip.push(route, rows[0], None))

    def home() -> Gradients:
        tokens, by_pair = [wait and wait(), *(None for _ in rows[1:])], None
        if weighted:  # the gradients of a token's pairs here are one row
            units, top_k = weights.shape
            lanes = weights.new_full((units, top_k), -1, dtype=torch.int32)
            numbers = torch.arange(units, dtype=torch.int32, device=weights.device)
            lanes[:, 0] = numbers.where(route.places.slots != 0, -1)
            exact = replace(trip, form=WEIGHTS)
            by_pair = trip.peers.start(lambda: exact.push(route, weights, None, lanes))()
        return [by_pair, *tokens]

    return home


def _home_back(
    trip: Trip, route: Any, kept: Sequence[Any], gradients: Sequence[Tensor]
) -> Callable[[], Gradients]:
    """The gradients of rows go the way of their tokens."""
    here, there, out = kept
    (dy,), places = gradients, route.places
    form = trip.form if there is None else Form(trip.form.hidden, dy.dtype, dy.dtype)
    whole = replace(trip, form=form)
    wait = trip.peers.start(lambda: whole.pull(route, [dy], there, None))

    def there_again() -> Gradients:
        pulled = wait()
        (grads,) = form.decode(pulled.fields)
        weights = here if there is None else pulled.weights
        if weights is None:
            return [grads, None, None]
        rows, pairs = places.pairs()
        known = pairs.clamp_min(0).long()
        value = out if there is None else out.to(trip.form.wire).to(out.dtype)
        grads, by_row = operators.unpermute_backward(
            grads, value, rows[:, None], rows, weights.flatten()[known, None]
        )
        if there is None:
            d_here = weights.new_zeros(weights.numel() + 1)
            d_here[pairs.long()] = by_row[:, 0]  # padding goes to the last one
            return [grads, d_here[:-1].view_as(weights), None]
        top_k = route.pairs[1]
        spread = by_row.new_zeros(len(pairs), top_k).scatter_(1, known[:, None] % top_k, by_row)
        exact = replace(trip, form=WEIGHTS)
        d_there = trip.peers.start(lambda: exact.push(route, spread, None))()
        return [grads.to(trip.form.wire).to(grads.dtype), None, d_there]

    return there_again
