# SPDX-License-Identifier: MIT
"""Experts that change ranks between two steps: weights and what else is kept for each of them.

    slots of rank r       r S / P to (r + 1) S / P, of S; `old` and `new` name the expert in each
    a slot that changes   gets the bytes of its expert from this rank, else from that holder which
                          has least to send, once a rank
    a round               a span of bytes of every expert that moves, all to all: all are read
                          before one is written, so experts may change places in circles

Spans are as wide as `max_bytes` allows: no second copy of the experts is made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops import _check
from kimi_ops.parallel import messages
from kimi_ops.parallel.local import LocalGroup, LocalTransport

__all__ = ["Move", "move_experts", "moves"]
_OP = "move_experts"
Piece = tuple[int, int, int]  # of tensor n, bytes from .. to of an expert


@dataclass(frozen=True)
class Move:
    """One expert's way from a slot to slots of one rank; slots count from the rank's first."""

    source: int
    slot: int
    target: int
    slots: tuple[int, ...]


def moves(old: Sequence[int], new: Sequence[int], world: int, *, in_place: bool) -> list[Move]:
    """What has to travel, by target and expert; `in_place` leaves slots that stay alone."""
    before, after = len(old) // world, len(new) // world
    held: dict[int, dict[int, int]] = {}  # expert: {rank: its first slot there}
    for place, expert in enumerate(old):
        held.setdefault(expert, {}).setdefault(place // before, place % before)
    given = [0] * world
    found = []
    for target in range(world):
        wanted: dict[int, list[int]] = {}
        for slot, expert in enumerate(new[target * after : (target + 1) * after]):
            if not (in_place and old[target * before + slot] == expert):
                wanted.setdefault(expert, []).append(slot)
        for expert, slots in sorted(wanted.items()):
            holders = held[expert]
            source = target if target in holders else min(holders, key=lambda r: (given[r], r))
            given[source] += source != target
            found.append(Move(source, holders[source], target, tuple(slots)))
    return found


def move_experts(
    tensors: Sequence[Tensor],
    old: Tensor,
    new: Tensor,
    group: dist.ProcessGroup | LocalGroup | None = None,
    *,
    out: Sequence[Tensor] | None = None,
    max_bytes: int = 2**24,
) -> int:
    """Move experts between ranks, bit for bit: after it the slots of all ranks hold those of `new`.

    Parameters
    ----------
    tensors : sequence of Tensor [slots of this rank, ...], contiguous, of any dtype
        What is kept for an expert: weights, momentum, masters. Shapes beyond the first dimension
        and dtypes are the same on every rank.
    old, new : Tensor [S] of integers
        The expert in each slot, a row of `ExpertPlacement.phy2log`; S counts the slots of all
        ranks, and may change where `out` is given. ``torch.arange(E)`` is where a model without a
        placement begins.
    group : ProcessGroup, a rank of a `LocalWorld`, or None
        The ranks; None is torch's default group. All of them call, with the same placements.
    out : sequence of Tensor, optional
        Where the experts go; `tensors` themselves by default.
    max_bytes : int
        The most that a rank's buffers hold at once.

    Returns
    -------
    int
        Bytes that came from other ranks.

    Raises
    ------
    TypeError, ValueError, EPPeerError, EPMismatch
        Arguments that this rank or another one refuses, or that differ; nothing has moved then.
    RuntimeError
        Of the group, where a rank is gone. Experts are in part moved: go on from a checkpoint.

    Notes
    -----
    Copies of an expert take the bytes of one of them: in training all of them have to be alike.
    Gradients do not move; call it between a step and the next backward. Optimizer states move with
    the weights as ``[p, *(s for s in optimizer.state[p].values() if s.shape == p.shape)]``.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import LocalWorld, move_experts
    >>> def work(group):
    ...     w = torch.tensor([[2.0 * group.rank], [2.0 * group.rank + 1]])  # experts 2 r, 2 r + 1
    ...     came = move_experts([w], torch.arange(4), torch.tensor([3, 1, 2, 0]), group)
    ...     return w.flatten().tolist(), came
    >>> LocalWorld(2).run(work)
    [([3.0, 1.0], 4), ([2.0, 0.0], 4)]
    """
    ranks = _Ranks(group)
    rank, world = ranks.rank, ranks.world
    fault: Exception | None = None
    told: dict[str, str] = {}
    try:
        told = _checked(tensors, old, new, tensors if out is None else out, world, max_bytes)
    except (TypeError, ValueError) as error:
        fault = error
    found = ranks.tell([messages.short(fault), told])
    if fault is not None:
        raise fault
    messages.raise_faults(_OP, [each[0] for each in found])
    for name in told:
        messages.agree(_OP, name, [each[1][name] for each in found])

    planned = moves(old.tolist(), new.tolist(), world, in_place=out is None)
    if not planned:
        return 0
    most = max(sum((m.source == r) + (m.target == r) for m in planned) for r in range(world))
    width = max_bytes // most
    if not width:
        raise ValueError(
            f"{_OP}: max_bytes: expected at least {most}, a byte of each expert that a rank "
            f"sends or gets, got {max_bytes}; raise it"
        )
    sent = [m for m in planned if m.source == rank]
    came = sorted((m for m in planned if m.target == rank), key=lambda m: m.source)
    to = [sum(m.target == r for m in sent) for r in range(world)]
    of = [sum(m.source == r for m in came) for r in range(world)]
    given, taken = _views(tensors), _views(tensors if out is None else out)
    for pieces in _rounds([view.shape[1] for view in given], width):
        lengths = [b - a for _, a, b in pieces]
        leaving = given[0].new_empty(len(sent), sum(lengths))
        for row, move in zip(leaving, sent, strict=True):
            for part, (n, a, b) in zip(row.split(lengths), pieces, strict=True):
                part.copy_(given[n][move.slot, a:b])
        spans = ([n * sum(lengths) for n in rows] for rows in (to, of))
        arrived = ranks.exchange(leaving.view(-1), *spans).view(len(came), sum(lengths))
        for row, move in zip(arrived, came, strict=True):
            for part, (n, a, b) in zip(row.split(lengths), pieces, strict=True):
                for slot in move.slots:
                    taken[n][slot, a:b].copy_(part)
    return sum(m.source != rank for m in came) * sum(view.shape[1] for view in given)


class _Ranks:
    """What ranks tell each other, whatever they are."""

    def __init__(self, group: dist.ProcessGroup | LocalGroup | None) -> None:
        self._local: LocalTransport | None = None
        if isinstance(group, LocalGroup):
            self._local = LocalTransport(group, 30.0, torch.device("cpu"))
            self.rank, self.world = group.rank, group.size
            return
        if not isinstance(group := group or dist.group.WORLD, dist.ProcessGroup):
            raise TypeError(
                f"{_OP}: group: expected a ProcessGroup or a rank of a LocalWorld, got "
                f"{type(group).__name__}; call torch.distributed.init_process_group"
            )
        self._group = group
        self.rank, self.world = group.rank(), group.size()

    def tell(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self._local is not None:
            return messages.texts(self._local.gather(messages.text(value)))
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._group)
        return found

    def exchange(self, buffer: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if self._local is not None:
            return self._local.start(buffer, sent, received)()
        arrived = buffer.new_empty(sum(received))
        try:
            dist.all_to_all_single(arrived, buffer, received, sent, group=self._group)
        except RuntimeError as error:
            error.add_note(f"{_OP}: experts are in part moved; go on from a checkpoint")
            raise
        return arrived


def _views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bytes [slots, bytes of an expert] of each tensor."""
    rows = (tensor.detach().view(len(tensor), tensor[0].numel()) for tensor in tensors)
    return [row.view(torch.uint8) for row in rows]


def _rounds(widths: Sequence[int], width: int) -> Iterator[list[Piece]]:
    """Pieces of `width` bytes together, the last round's fewer."""
    pieces: list[Piece] = []
    room = width
    for n, size in enumerate(widths):
        start = 0
        while start < size:
            end = min(size, start + room)
            pieces.append((n, start, end))
            room -= end - start
            start = end
            if not room:
                yield pieces
                pieces, room = [], width
    if pieces:
        yield pieces


def _checked(
    tensors: Sequence[Tensor],
    old: Tensor,
    new: Tensor,
    out: Sequence[Tensor],
    world: int,
    max_bytes: int,
) -> dict[str, str]:
    """What all ranks must have alike, of arguments that are right by themselves."""
    _check.between(_OP, "max_bytes", max_bytes, 1, 2**62)
    for name, value in (("old", old), ("new", new)):
        _check.tensor(_OP, name, value)
        _check.shape(_OP, name, value, ("S",), "give a row of phy2log")
        _check.dtype(_OP, name, value, (torch.int64, torch.int32), "give a row of phy2log")
        if not len(value) or len(value) % world or int(value.min()) < 0:
            raise ValueError(
                f"{_OP}: {name}: expected experts, from 0 on, in a multiple of {world} slots, got "
                f"{len(value)} of them{f', {int(value.min())} among them' if len(value) else ''}; "
                "every rank has equally many"
            )
    if lost := sorted(set(new.tolist()) - set(old.tolist())):
        raise ValueError(
            f"{_OP}: new: expected experts of old, got {lost[0]} besides; no rank has it"
        )
    mend = "a row for each slot of this rank; where their number changes, pass out"
    for name, given, slots in (("tensors", tensors, len(old)), ("out", out, len(new))):
        if not given or len(given) != len(tensors):
            raise ValueError(
                f"{_OP}: {name}: expected {len(tensors) or 'some'} tensors, got {len(given)}; "
                "give one for each kind of bytes of an expert"
            )
        for tensor, like in zip(given, tensors, strict=True):
            _check.tensor(_OP, name, tensor)
            _check.shape(_OP, name, tensor, [slots // world, *like.shape[1:]], mend)
            _check.dtype(_OP, name, tensor, (like.dtype,))
            _check.same_device(_OP, name, tensor, "the first", tensors[0])
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{_OP}: {name}: expected contiguous tensors, got strides {tensor.stride()}; "
                    "pass what owns the memory, not a view of some of its columns"
                )
    kinds = [(tensor.dtype, list(tensor.shape[1:])) for tensor in tensors]
    return {
        "tensors": f"{len(kinds)}, {_digest(kinds)}",
        "old": f"{len(old)} slots, {_digest(old.tolist())}",
        "new": f"{len(new)} slots, {_digest(new.tolist())}",
        "out": "none" if out is tensors else "given",
        "max_bytes": str(max_bytes),
    }


def _digest(value: Any) -> str:
    return f"sha256 {sha256(str(value).encode()).hexdigest()[:12]}"
