# SPDX-License-Identifier: MIT
"""Who updates what: the pieces of the parameters, their owners, and what travels between ranks.

ZeRO-1 over whole matrices. Every rank holds all parameters; a piece (a parameter, or some of the
leading matrices of a stack) has one owner, which alone keeps its state. A step is

    gradients      reduced to the owners                   as many bytes as a reduce-scatter
    squared norms  one all-reduce, a number for each piece
    update         Newton-Schulz of whole matrices on the owner, nothing is computed twice
    parameters     broadcast by the owners                 as many bytes as an all-gather

Pieces do not depend on the number of ranks, so neither do the bits.

DTensor parameters come without a process group: their meshes say which ranks share them. Such a
parameter is one piece, this rank's rows, with a state placed like it; only matrices of Muon whose
rows lie on several ranks travel (muon_routes.py), and the squared norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.optim import engine
from kimi_ops.optim.muon_agreement import agree
from kimi_ops.optim.muon_blocks import cost
from kimi_ops.optim.muon_mesh import circle_of, local, meeting_place, meshes_of, placed, sharded
from kimi_ops.optim.muon_routes import Route, route_of, travels, whole_heads

_CUTS = 8  # pieces of a parameter whose leading rows are independent
_BUCKET = 1 << 25  # elements that travel at once


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of `param` along its first dimension; of a DTensor this rank's rows."""

    param: Tensor
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        if sharded(tensor):
            return local(tensor)
        return tensor[self.start : self.stop] if tensor.ndim else tensor

    @property
    def shape(self) -> torch.Size:
        if self.param.ndim == 0:
            return self.param.shape
        return torch.Size((self.stop - self.start, *self.param.shape[1:]))


def pieces_of(param: Tensor, group: dict[str, Any]) -> list[Piece]:
    """The pieces of one parameter: of AdamW rows, of Muon matrices of a stack."""
    rows = param.shape[0] if param.ndim else 1
    if sharded(param):
        return [Piece(param, 0, rows)]
    stack = param.ndim > 2 and group["batch_dims"] == "leading"
    cuts = min(rows, _CUTS) if stack or group["algorithm"] == "adamw" else 1
    edges = [rows * i // max(cuts, 1) for i in range(max(cuts, 1) + 1)]
    return [Piece(param, a, b) for a, b in zip(edges, edges[1:], strict=False)]


class Shards:
    """The owners of all pieces, and the exchange between them.

    Parameters
    ----------
    process_group : ProcessGroup or None
        None: one process that owns everything and exchanges nothing.
    reduce_gradients : bool
        Average the gradients over the ranks; False where they are equal already (DDP).
    """

    def __init__(self, process_group: dist.ProcessGroup | None, reduce_gradients: bool) -> None:
        self.process_group = process_group
        self.reduce_gradients = reduce_gradients
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.world = 1 if process_group is None else dist.get_world_size(process_group)
        self.pieces: list[Piece] = []
        self.owners: list[int] = []
        self.loads = [0] * self.world
        self.numbers: dict[Tensor, range] = {}  # the pieces of each parameter
        self.shapes: dict[Tensor, torch.Size] = {}
        self.routes: dict[Tensor, Route] = {}
        self.heads: dict[Tensor, int] = {}  # on this rank, where shards end between heads
        self.journeys: dict[dist.ProcessGroup, list[int]] = {}  # the loads of such ranks
        self.circles: dict[dist.ProcessGroup, list[int]] = {}  # the pieces that ranks share

    def update(self, param_groups: list[dict[str, Any]]) -> None:
        """Give every new piece to the rank with the least work so far, the most expensive first."""
        self.check_shapes()
        fresh = [
            (param, group)
            for group in param_groups
            for param in group["params"]
            if param not in self.numbers
        ]
        if not fresh:
            return
        if len({param for param, _ in fresh}) < len(fresh):
            raise ValueError(
                "MuonClip: params: expected each parameter once, got one several times in a group, "
                "which would be updated as often; drop the repetitions"
            )
        meshes = meshes_of(param_groups)
        for groups in [[self.process_group]] if self.process_group is not None else meshes:
            agree(groups, param_groups)
        costs: list[int] = []
        first = len(self.pieces)
        for param, group in fresh:
            pieces = pieces_of(param, group)
            self.numbers[param] = range(len(self.pieces), len(self.pieces) + len(pieces))
            self.shapes[param] = param.shape
            self.pieces += pieces
            costs += [cost(piece.shape, group) for piece in pieces]
            if group["algorithm"] == "muon" and (heads := whole_heads(param, group)) is not None:
                self.heads[param] = heads
            circle = self.process_group if not sharded(param) else circle_of(param)
            if circle is not None:
                self.circles.setdefault(circle, []).extend(self.numbers[param])
        self.owners += [0] * len(costs)
        for index, owner in _shared_out(costs, self.loads):
            self.owners[first + index] = owner
        self._plan_routes([(p, group) for p, group in fresh if travels(p, group)])

    def _plan_routes(self, fresh: list[tuple[Tensor, dict[str, Any]]]) -> None:
        for circle in dict.fromkeys(circle_of(param) for param, _ in fresh):
            assert circle is not None
            here = [(param, group) for param, group in fresh if circle_of(param) == circle]
            loads = self.journeys.setdefault(circle, [0] * dist.get_world_size(circle))
            turns = [0] * len(loads)
            for index, owner in _shared_out([cost(p.shape, g) for p, g in here], loads):
                param, group = here[index]
                self.routes[param] = route_of(param, group, owner, turns[owner])
                turns[owner] += 1

    def check_shapes(self) -> None:
        """Raise for a parameter whose shape is not what it was."""
        for param, shape in self.shapes.items():
            if param.shape != shape:
                raise ValueError(
                    f"MuonClip: params: expected the shape {tuple(shape)} that a parameter had "
                    f"before, got {tuple(param.shape)}; make a new optimizer for it"
                )

    def mine(self, param: Tensor) -> list[int]:
        """The numbers of the pieces of a parameter that this rank owns, in their order."""
        return [i for i in self.numbers[param] if self.owners[i] == self.rank]

    def local(self, param: Tensor, full: Tensor) -> Tensor:
        """The part of `full`, a state of the whole parameter, that this rank keeps."""
        if sharded(param) or sharded(full):
            return placed(param, full)
        numbers = self.mine(param)
        if len(numbers) == len(self.numbers[param]):
            return full
        return torch.cat([self.pieces[i].of(full) for i in numbers])

    def join(self, param: Tensor, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The state of a whole parameter from those of all ranks."""
        whole: dict[str, Tensor] = {}
        for rank, part in enumerate(parts):
            owned = [self.pieces[i] for i in self.numbers[param] if self.owners[i] == rank]
            for key, value in part.items():
                if key == "step" or value.shape == param.shape:
                    whole[key] = value
                    continue
                full = whole.setdefault(key, value.new_zeros(param.shape))
                sizes = [piece.stop - piece.start for piece in owned]
                for piece, rows in zip(owned, value.split(sizes), strict=True):
                    piece.of(full).copy_(rows)
        return whole

    def present(self) -> list[bool]:
        """For each piece, whether any rank has a gradient of its parameter."""
        here = [piece.param.grad is not None for piece in self.pieces]
        for circle, numbers in self.circles.items():
            place = meeting_place(circle, self.pieces[numbers[0]].param.device)
            flags = torch.tensor([here[i] for i in numbers], dtype=torch.int32, device=place)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=circle)
            for i, flag in zip(numbers, flags.tolist(), strict=True):
                here[i] = bool(flag)
        return here

    def gradients(self, present: list[bool]) -> dict[int, Tensor]:
        """The averaged gradients of the pieces that this rank owns, by the number of the piece."""
        if self.process_group is None or not self.reduce_gradients:
            chosen = [i for i, there in enumerate(present) if there and self.owners[i] == self.rank]
            return {i: self._gradient(self.pieces[i]) for i in chosen}
        found: dict[int, Tensor] = {}
        for owner, members in self._buckets(present):
            pieces = [self.pieces[i] for i in members]
            # 16-bit gradients are summed in fp32
            flat = torch.cat([_wide(self._gradient(piece)).flatten() for piece in pieces])
            root = dist.get_global_rank(self.process_group, owner)
            dist.reduce(flat, root, dist.ReduceOp.SUM, group=self.process_group)
            if owner == self.rank:
                flat /= self.world
                parts = flat.split([piece.shape.numel() for piece in pieces])
                for i, piece, part in zip(members, pieces, parts, strict=True):
                    found[i] = part.view(piece.shape)
        return found

    def squares(self, gradients: dict[int, Tensor]) -> Tensor:
        """The squared norm of every piece's gradient in fp64, [pieces]; 0 where there is none.

        Not finite where a gradient is not: fp64 holds the square of everything else.
        """
        device = self.pieces[0].param.device if self.pieces else None
        squares = torch.zeros(len(self.pieces), dtype=torch.float64, device=device)
        grads = list(gradients.values())
        places = [range(i, i + 1) for i in gradients]
        engine.squares_(squares, grads, places, [[grad.numel()] for grad in grads])
        for circle, numbers in self.circles.items():
            every = len(numbers) == len(squares)
            mine = squares if every else squares[numbers]
            parts = mine.new_empty(dist.get_world_size(circle), len(numbers))
            # added up here, in one order: replicas of a circle must not differ by a bit. Zeros of
            # ranks that do not own a piece change nothing, and NaN stays.
            dist.all_gather(list(parts.unbind(0)), mine, group=circle)
            if every:
                squares = parts.sum(0)
            else:
                squares[numbers] = parts.sum(0)
        return squares

    def publish(self, present: list[bool]) -> None:
        """Bring the owners' parameters to all ranks."""
        if self.process_group is None:
            return
        for owner, members in self._buckets(present):
            views = [self.pieces[i].of(self.pieces[i].param) for i in members]
            flat = torch.cat([view.flatten() for view in views])
            root = dist.get_global_rank(self.process_group, owner)
            dist.broadcast(flat, root, group=self.process_group)
            if owner != self.rank:
                parts = flat.split([view.numel() for view in views])
                for view, part in zip(views, parts, strict=True):
                    view.copy_(part.view(view.shape))

    def _gradient(self, piece: Piece) -> Tensor:
        grad = piece.param.grad
        return piece.of(torch.zeros_like(piece.param) if grad is None else grad)

    def _buckets(self, present: list[bool]) -> Iterator[tuple[int, list[int]]]:
        """Pieces of one owner and dtype that travel together, in an order all ranks share."""
        queues: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
        for index, piece in enumerate(self.pieces):
            if present[index]:
                key = (self.owners[index], piece.param.dtype, piece.param.device)
                queues.setdefault(key, []).append(index)
        for (owner, _, _), members in queues.items():
            bucket: list[int] = []
            size = 0
            for index in members:
                if bucket and size + self.pieces[index].shape.numel() > _BUCKET:
                    yield owner, bucket
                    bucket, size = [], 0
                bucket.append(index)
                size += self.pieces[index].shape.numel()
            yield owner, bucket


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _shared_out(costs: list[int], loads: list[int]) -> Iterator[tuple[int, int]]:
    """The most expensive first, each with the rank that has the least to do, whose load grows."""
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(len(loads)), key=lambda rank: (loads[rank], rank))
        loads[rank] += costs[index]
        yield index, rank
