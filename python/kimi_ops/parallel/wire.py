# SPDX-License-Identifier: MIT
"""Records: what travels between ranks that share no memory, as bytes and as gradients.

A record is a row of bytes: the fields of a token (values in the wire's dtype; FP8 values and a
scale for each 128 of them), then its router weights and expert ids where they are sent.

The gradient of an exchange is the exchange the other way round, in the dtype of `back`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kimi_ops import formats
from kimi_ops.moe import permute as native
from kimi_ops.parallel.journey import Gradients, Journey
from kimi_ops.reference import permute as twin

FP8 = torch.float8_e4m3fn
Field = tuple[int, torch.dtype]  # columns, dtype


@dataclass(frozen=True)
class Form:
    """How tokens [N, hidden] of `dtype` travel; `dtype` None: pairs of FP8 values and scales."""

    hidden: int
    dtype: torch.dtype | None
    wire: torch.dtype

    @property
    def fields(self) -> list[Field]:
        if self.wire == FP8:
            return [(self.hidden, FP8), (formats.blocks(self.hidden), torch.float32)]
        return [(self.hidden, self.wire)]

    def encode(self, *tokens: Tensor) -> list[Tensor]:
        if self.dtype is None:
            return list(tokens)
        if self.wire == FP8:
            return list(formats.quantize_rows(tokens[0]))
        return [tokens[0].to(self.wire)]

    def decode(self, fields: list[Tensor]) -> tuple[Tensor, ...]:
        if self.dtype is None:
            return tuple(fields)
        if self.wire == FP8:
            return (formats.dequantize_rows(*fields).to(self.dtype),)
        return (fields[0].to(self.dtype),)


def pack(fields: Sequence[Tensor]) -> Tensor:
    """[N, bytes of a record] uint8 from fields [N, *]."""
    return torch.cat([_dense(field).view(torch.uint8) for field in fields], 1)


def unpack(records: Tensor, fields: Sequence[Field]) -> list[Tensor]:
    """The fields of records [N, bytes]."""
    sizes = [columns * dtype.itemsize for columns, dtype in fields]
    # a copy: fields need not be aligned in a record
    copies = (part.clone(memory_format=torch.contiguous_format) for part in records.split(sizes, 1))
    return [_dense(copy).view(dtype) for copy, (_, dtype) in zip(copies, fields, strict=True)]


def _dense(field: Tensor) -> Tensor:
    """With strides that say so, for one row or column too."""
    return field.contiguous().as_strided(field.shape, (field.shape[1], 1))


Arrival = Callable[[], list[Tensor]]


class Way(Protocol):
    """How records get to other ranks, and their gradients back."""

    @property
    def sent(self) -> list[int]: ...
    @property
    def form(self) -> Form: ...
    @property
    def back(self) -> Form: ...
    def start(self, tokens: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> Arrival: ...
    def reversed(self) -> Self: ...


@dataclass(frozen=True)
class Crossing:
    """One exchange: `sent[r]` records to rank r, `received[r]` from it; gradients in `back`."""

    start_bytes: Callable[[Tensor, list[int], list[int]], Callable[[], Tensor]]
    sent: list[int]
    received: list[int]
    form: Form
    back: Form

    def start(self, tokens: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> Arrival:
        fields = [*self.form.encode(*tokens), *beside]
        kinds = [(field.shape[1], field.dtype) for field in fields]
        records = pack(fields)
        size = records.shape[1]
        sent, received = ([n * size for n in counts] for counts in (self.sent, self.received))
        arrived = self.start_bytes(records.flatten(), sent, received)
        total = sum(self.received)
        return lambda: unpack(arrived().view(total, size), kinds)

    def reversed(self) -> "Crossing":
        return Crossing(self.start_bytes, self.received, self.sent, self.back, self.form)


def _back(
    crossing: Way, weighted: bool, kept: Any, gradients: Sequence[Tensor]
) -> Callable[[], Gradients]:
    """The gradients of weights and tokens cross back."""
    weights, *tokens = gradients
    given = crossing.back.dtype is None
    if given:  # FP8 values have no gradient: beside that of the weights nothing travels
        tokens = [tokens[0].new_empty(sum(crossing.sent), 0, dtype=torch.float32)]
    arrival = crossing.start(tokens, [weights] if weighted else [])

    def came() -> Gradients:
        fields = arrival()
        values = (None, None) if given else crossing.form.decode(fields[:1])
        return [fields[1] if weighted else None, *values]

    return came


def moves_of(dtype: torch.dtype) -> Any:
    """What sorts rows of a dtype: the twin, where there are no kernels."""
    return twin if dtype == torch.float64 else native


class Records:
    """The `Motions` of a backend that moves bytes: sort, pack, exchange, unpack, sort."""

    def __init__(self, way: Callable[[Any, Form, Form], Way]) -> None:
        self._way = way  # of a route's records, in a form, and of their gradients

    def away(
        self, op: str, route: Any, form: Form, back: Form, tokens: Sequence[Tensor],
        weights: Tensor | None, ids: Tensor | None,
    ) -> "Leaving":  # fmt: skip
        crossing = self._way(route, form, back)
        if route.direct:  # which are in the order of their experts
            ids = None
        return Leaving(op, crossing, route.there, tokens, weights, ids)

    def home(
        self, op: str, route: Any, form: Form, tie: Tensor, out: Tensor, here: Tensor | None,
        there: Tensor | None,
    ) -> Callable[[], Tensor]:  # fmt: skip
        moves = moves_of(out.dtype)
        records = moves.unpermute(out, route.here, here)
        crossing = self._way(route, form, form).reversed()
        journey = Journey(op, lambda: crossing.start([records]), tie, None, records)

        def outputs(wanted: bool) -> tuple[list[Tensor | None], list[Tensor]]:
            return [None, *form.decode(journey.wait())], []

        def sums() -> Tensor:
            values = journey.arrive(outputs, partial(_back, crossing.reversed(), False))[2]
            return moves.unpermute(values, route.there, there)

        return sums


class Leaving:
    """Tokens on their way as records."""

    def __init__(
        self, op: str, crossing: Way, there: Any, tokens: Sequence[Tensor],
        weights: Tensor | None, ids: Tensor | None,
    ) -> None:  # fmt: skip
        self._crossing, self._with_ids = crossing, ids is not None
        self._moves = moves = moves_of(tokens[0].dtype)
        records = [moves.permute(part, there) for part in tokens]
        weights = None if weights is None else moves.permute(weights, there)
        beside = [] if weights is None else [weights]
        if ids is not None:
            beside.append(moves.permute(ids, there))
        self._weighted, tie = weights is not None, records[0].new_empty(0, dtype=torch.float32)
        self._journey = Journey(
            op, lambda: crossing.start(records, beside), tie, weights, *records
        )  # fmt: skip

    def ids(self) -> Tensor | None:
        self._fields = self._journey.wait()
        return self._fields.pop() if self._with_ids else None

    def finish(self, route: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        fields, weighted, form = self._fields, self._weighted, self._crossing.form
        count = len(form.fields)

        def outputs(wanted: bool) -> tuple[list[Tensor | None], list[Tensor]]:
            return [fields[count] if weighted else None, *form.decode(fields[:count])], []

        tie, weights, *values = self._journey.arrive(
            outputs,
            partial(_back, self._crossing.reversed(), weighted),
            constant=form.dtype is None,
        )
        return tie, weights, [self._moves.permute(value, route.here) for value in values]
