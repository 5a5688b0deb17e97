# SPDX-License-Identifier: MIT
"""Who updates what: the pieces of the parameters, their owners, and the norms that all ranks know.

ZeRO-1 over whole matrices. Every rank holds all parameters; a piece (a parameter, or some of the
leading matrices of a stack) has one owner, which alone keeps its state. A step is

    presence       a byte for each piece, on the host
    gradients      reduced to the owners                   as many bytes as a reduce-scatter
    squared norms  one all-gather, a number for each piece
    update         Newton-Schulz of whole matrices on the owner, nothing is computed twice
    parameters     broadcast by the owners                 as many bytes as an all-gather

Pieces do not depend on the number of ranks, so neither do the bits.

DTensor parameters come without a process group: their meshes say which ranks share them. Such a
parameter is one piece, this rank's rows, with a state placed like it; only matrices of Muon whose
rows lie on several ranks travel, and the squared norms. How either travels: muon_exchange.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.optim import engine
from kimi_ops.optim.muon_agreement import agree
from kimi_ops.optim.muon_blocks import cost
from kimi_ops.optim.muon_circle import Circle
from kimi_ops.optim.muon_exchange import averages
from kimi_ops.optim.muon_mesh import circle_of, local, meshes_of, placed, sharded
from kimi_ops.optim.muon_routes import Owners, Route, row_route, travels, whole_heads

_CUTS = 8  # pieces of a parameter whose leading rows are independent


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
        self.numbers: dict[Tensor, range] = {}  # the pieces of each parameter
        self.shapes: dict[Tensor, torch.Size] = {}
        self.routes: dict[int, Route] = {}  # of the pieces that travel
        self.heads: dict[Tensor, int] = {}  # on this rank, where shards end between heads
        self.circles: dict[dist.ProcessGroup, Circle] = {}
        self.members: dict[Circle, list[int]] = {}  # the pieces that its ranks share
        self._places: dict[Circle, Tensor] = {}  # these numbers, beside the parameters
        self._owners: dict[Circle, Owners] = {}

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
            agree([self._circle(group) for group in groups], param_groups)
        found: dict[Circle, list[tuple[int, dict[str, Any]]]] = {}
        for param, group in fresh:
            pieces = pieces_of(param, group)
            numbers = range(len(self.pieces), len(self.pieces) + len(pieces))
            self.numbers[param], self.shapes[param] = numbers, param.shape
            self.pieces += pieces
            if group["algorithm"] == "muon" and (heads := whole_heads(param, group)) is not None:
                self.heads[param] = heads
            ranks = circle_of(param) if sharded(param) else self.process_group
            if ranks is not None:
                circle = self._circle(ranks)
                self.members.setdefault(circle, []).extend(numbers)
                if self.process_group is not None or travels(param, group):
                    found.setdefault(circle, []).extend((number, group) for number in numbers)
        for circle, members in self.members.items():
            self._places[circle] = torch.tensor(members, device=self.pieces[0].param.device)
        for circle, travellers in found.items():
            owners = self._owners.setdefault(circle, Owners(circle.world))
            costs = [cost(self.pieces[number].shape, group) for number, group in travellers]
            for (i, group), (owner, turn) in zip(travellers, owners.give(costs), strict=True):
                piece = self.pieces[i]
                self.routes[i] = (
                    row_route(piece.param, group, circle, owner, turn)
                    if sharded(piece.param)
                    else Route(circle, owner, turn, piece.shape)
                )

    def _circle(self, group: dist.ProcessGroup) -> Circle:
        if group not in self.circles:
            self.circles[group] = Circle(group)
        return self.circles[group]

    def told(self, group: dist.ProcessGroup, what: str) -> AbstractContextManager[None]:
        """An exchange of a group; its failure names ranks where they share parameters."""
        return self.circles[group].told(what) if group in self.circles else nullcontext()

    def check_shapes(self) -> None:
        """Raise for a parameter whose shape is not what it was."""
        for param, shape in self.shapes.items():
            if param.shape != shape:
                raise ValueError(
                    f"MuonClip: params: expected the shape {tuple(shape)} that a parameter had "
                    f"before, got {tuple(param.shape)}; make a new optimizer for it"
                )

    def mine(self, param: Tensor) -> list[int]:
        """The numbers of the pieces of a parameter whose state is here, in their order."""
        return [i for i in self.numbers[param] if self._keeps(i)]

    def _keeps(self, i: int) -> bool:
        route = self.routes.get(i)
        return route is None or not route.is_copy or route.owner == self.rank

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
            owned = [self.pieces[i] for i in self.numbers[param] if self.routes[i].owner == rank]
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
        for circle, numbers in self.members.items():
            circle.step += 1
            flags = torch.tensor([here[i] for i in numbers], dtype=torch.uint8, device="cpu")
            found = circle.each(flags, "the presence of gradients").any(0)
            for i, flag in zip(numbers, found.tolist(), strict=True):
                here[i] = bool(flag)
        return here

    def gradients(self, present: list[bool]) -> dict[int, Tensor]:
        """The averaged gradients of the pieces that are worked here, by the number of the piece."""
        chosen = [i for i, there in enumerate(present) if there]
        if self.process_group is None or not self.reduce_gradients:
            return {i: self._gradient(i) for i in chosen if self._keeps(i)}
        params = [self.pieces[i].param for i in chosen]
        keys = [(param.dtype, param.device) for param in params]
        routes = [self.routes[i] for i in chosen]
        found = averages(routes, keys, lambda number: self._gradient(chosen[number]))
        return {chosen[number]: gradient for number, gradient in found.items()}

    def copies(self, present: list[bool]) -> list[tuple[Route, Tensor]]:
        """Of all pieces that move and that every rank holds: the route, and the rows."""
        numbers = [i for i, route in self.routes.items() if present[i] and route.is_copy]
        return [(self.routes[i], self.pieces[i].of(self.pieces[i].param)) for i in numbers]

    def squares(self, gradients: dict[int, Tensor]) -> Tensor:
        """The squared norm of every piece's gradient in fp64, [pieces]; 0 where there is none.

        Not finite where a gradient is not: fp64 holds the square of everything else.
        """
        device = self.pieces[0].param.device if self.pieces else None
        squares = torch.zeros(len(self.pieces), dtype=torch.float64, device=device)
        grads = list(gradients.values())
        places = [range(i, i + 1) for i in gradients]
        engine.squares_(squares, grads, places, [[grad.numel()] for grad in grads])
        for circle, numbers in self.members.items():
            # added up here, in one order: replicas of a circle must not differ by a bit. Zeros of
            # ranks that do not own a piece change nothing, and NaN stays.
            chosen = self._places[circle]
            parts = squares.new_empty(circle.world, len(numbers))
            with circle.told("squared norms"):
                dist.all_gather(list(parts.unbind(0)), squares[chosen], group=circle.group)
            squares[chosen] = parts.sum(0)
        return squares

    def _gradient(self, i: int) -> Tensor:
        param = self.pieces[i].param
        return self.pieces[i].of(torch.zeros_like(param) if param.grad is None else param.grad)
