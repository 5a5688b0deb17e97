# SPDX-License-Identifier: MIT
"""Records: what travels between ranks, as bytes and as gradients.

A record is a row of bytes: the fields of a token (values in the wire's dtype; FP8 values and a
scale for each 128 of them), then its router weights and expert ids where they are sent.

The gradient of an exchange is the exchange the other way round, in the dtype of `back`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_ops import formats

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


@dataclass(frozen=True)
class Crossing:
    """One exchange: `sent[r]` records to rank r, `received[r]` from it; gradients in `back`."""

    start_bytes: Callable[[Tensor, list[int], list[int]], Callable[[], Tensor]]
    sent: list[int]
    received: list[int]
    form: Form
    back: Form

    def start(self, tokens: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> "Arrival":
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


Arrival = Callable[[], list[Tensor]]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, crossing: Crossing, arrival: Arrival, tie: Tensor, weights: Any, *tokens: Tensor
    ) -> tuple[Any, ...]:
        ctx.crossing, ctx.weighted = crossing, weights is not None
        fields = arrival()
        values = crossing.form.decode(fields[: len(crossing.form.fields)])
        beside = fields[len(crossing.form.fields) :]
        arrived = beside.pop(0) if ctx.weighted else None
        ids = beside.pop(0) if beside else None
        if crossing.form.dtype is None:
            ctx.mark_non_differentiable(*values)
        return (tie.clone(), arrived, ids, *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tie: Tensor, weights: Any, _: None, *tokens: Tensor) -> tuple[Any, ...]:
        crossing, given = ctx.crossing.reversed(), ctx.crossing.form.dtype is None
        if given:  # FP8 values have no gradient: beside that of the weights nothing travels
            tokens = (tie.new_empty(sum(crossing.sent), 0, dtype=torch.float32),)
        fields = crossing.start(tokens, [weights] if ctx.weighted else [])()
        values = (None, None) if given else crossing.form.decode(fields[:1])
        return (None, None, tie, fields[1] if ctx.weighted else None, *values)


def finish(
    crossing: Crossing, arrival: Arrival, tie: Tensor, weights: Tensor | None, *tokens: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """(tie, weights, ids, tokens) that arrived, with gradients to those that were sent.

    `tie` is an empty tensor that goes from exchange to exchange: a rank whose experts did nothing
    takes part in the backward all the same.
    """
    tie, arrived, ids, *values = _Exchange.apply(crossing, arrival, tie, weights, *tokens)
    return tie, arrived, ids, tuple(values)
