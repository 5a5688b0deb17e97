# SPDX-License-Identifier: MIT
"""Matrices whose rows lie on several ranks: gathered at one of them, orthogonalised, brought back.

    rank 0   u[0:2] --.                      .-- o[0:2]   p, momentum: each rank's own rows,
    rank 1   u[2:4] ----> owner: NS(u) = o -----> o[2:4]  u: the momentum with its look-ahead,
    rank 2   u[4:5] --'                      '-- o[4:5]   in the dtype of one process

Every rank owns some of the matrices, by the cost of their updates. A bucket of them is one
all-to-all there and one back: a rank sends and receives 4 bytes of fp32 twice for each element of
its rows and of the matrices that it owns. While a bucket is orthogonalised the next one is on its
way there and the last one on its way back:

    messages   there 0   there 1   back 0   there 2   back 1 ...
    arithmetic momenta 0   1     NS 0   2     NS 1    apply 0

A circle of ranks is one dimension of a mesh. Replicas of it (HSDP) each do their own exchange and
have equal bits, as their gradients do: to split the matrices between them, too, would send every
update once more, between the ranks that are the farthest apart, and a replica could not go on
without the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.optim.muon_blocks import blocks
from kimi_ops.optim.muon_mesh import circle_of, edges_of

Bands = tuple[tuple[int, int, torch.Size], ...]

_BUCKET = 1 << 25  # elements that a rank sends at once


@dataclass(frozen=True)
class Route:
    """Of one parameter: who holds which rows, who orthogonalises it, and when."""

    circle: dist.ProcessGroup
    owner: int
    turn: int  # how many matrices its owner takes before
    shape: torch.Size
    edges: tuple[int, ...]  # rank r holds rows edges[r] .. edges[r + 1]
    bands: Bands | None  # of this rank; None: the columns are cut

    def numel(self, rank: int) -> int:
        return (self.edges[rank + 1] - self.edges[rank]) * self.shape[1:].numel()

    def parts(self, x: Tensor, group: dict[str, Any]) -> list[tuple[Tensor, torch.Size]]:
        """Parts of this rank's rows x, each inside matrices of one shape."""
        if self.bands is None:
            return list(zip(blocks(x, group), matrix_shapes(self.shape, group), strict=True))
        flat = x if x.ndim == 2 else x.view(x.shape[0], self.shape[1:].numel())
        return [(flat[start:stop], shape) for start, stop, shape in self.bands]


def travels(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether matrices of the parameter lie on several ranks. AdamW is elementwise, and the
    shards of a stack hold whole matrices."""
    if group["algorithm"] != "muon" or _is_stack(param, group) or circle_of(param) is None:
        return False
    return whole_heads(param, group) is None


def whole_heads(param: Tensor, group: dict[str, Any]) -> int | None:
    """How many heads this rank's rows are, where all ranks hold whole ones of a matrix."""
    circle, heads = circle_of(param), group["num_heads"]
    if circle is None or not heads or group["head_dim"] != 0 or _is_stack(param, group):
        return None
    edges, rank = edges_of(param, dist.get_world_size(circle)), dist.get_rank(circle)
    rows = param.shape[0] // heads
    return None if any(edge % rows for edge in edges) else (edges[rank + 1] - edges[rank]) // rows


def _is_stack(param: Tensor, group: dict[str, Any]) -> bool:
    return param.ndim > 2 and group["batch_dims"] == "leading"


def route_of(param: Tensor, group: dict[str, Any], owner: int, turn: int) -> Route:
    circle = circle_of(param)
    assert circle is not None
    edges = edges_of(param, dist.get_world_size(circle))
    rank = dist.get_rank(circle)
    bands = _bands(param.shape, edges[rank], edges[rank + 1], group)
    return Route(circle, owner, turn, param.shape, edges, bands)


def matrix_shapes(shape: torch.Size, group: dict[str, Any]) -> list[torch.Size]:
    """Of the matrices that the group cuts a parameter into."""
    return [block.shape[-2:] for block in blocks(torch.empty(shape, device="meta"), group)]


def _bands(shape: torch.Size, start: int, stop: int, group: dict[str, Any]) -> Bands | None:
    """Runs of the rows start..stop inside matrices of one shape, counted from start."""
    shapes = matrix_shapes(shape, group)
    if len(set(shapes)) == 1:
        return ((0, stop - start, shapes[0]),)
    if group["head_dim"] == 1:
        return None
    kinds = torch.empty(shape[0], dtype=torch.int64, device="cpu")
    rows = torch.arange(shape[0], device="cpu").unsqueeze(1)  # cut as the parameter is
    for kind, block in enumerate(blocks(rows, group)):
        kinds[block.flatten()] = kind
    found, row = [], 0
    for kind, run in groupby(kinds[start:stop].tolist()):
        length = len(list(run))
        found.append((row, row + length, shapes[kind]))
        row += length
    return tuple(found)


def buckets(routes: list[Route], keys: list[Any]) -> Iterator[list[int]]:
    """Numbers of the routes that travel together: one circle and key, whole turns, in which all
    ranks have about as much to do; in an order that all ranks share."""
    queues: dict[Any, dict[int, list[int]]] = {}
    for i, (route, key) in enumerate(zip(routes, keys, strict=True)):
        queues.setdefault((route.circle, key), {}).setdefault(route.turn, []).append(i)
    for turns in queues.values():
        bucket: list[int] = []
        size = 0
        for turn in sorted(turns):
            more = sum(routes[i].shape.numel() for i in turns[turn])
            limit = _BUCKET * (len(routes[turns[turn][0]].edges) - 1)
            if bucket and size + more > limit:
                yield bucket
                bucket, size = [], 0
            bucket += turns[turn]
            size += more
        yield bucket


class Exchange:
    """One bucket there and back. `routes` ascend by owner; so do the rows that this rank holds of
    them, one after the other."""

    def __init__(self, routes: list[Route]) -> None:
        self.circle = routes[0].circle
        self.rank = dist.get_rank(self.circle)
        self.ranks = range(dist.get_world_size(self.circle))
        self.owned = [route for route in routes if route.owner == self.rank]
        self.held = [route.numel(self.rank) for route in routes]
        self.sent = [0] * len(self.ranks)
        for route, size in zip(routes, self.held, strict=True):
            self.sent[route.owner] += size
        self.received = [sum(route.numel(r) for route in self.owned) for r in self.ranks]

    def there(self, rows: list[Tensor]) -> None:
        """Start sending this rank's rows to the owners."""
        outgoing = torch.cat([x.flatten() for x in rows])
        self._send(outgoing, self.sent, self.received)

    def wholes(self) -> list[Tensor]:
        """The matrices that this rank owns, once their rows are here."""
        sources = [
            source.split([route.numel(r) for route in self.owned])
            for r, source in enumerate(self._arrived().split(self.received))
        ]
        return [
            torch.cat([source[i] for source in sources]).view(route.shape)
            for i, route in enumerate(self.owned)
        ]

    def back(self, wholes: list[Tensor]) -> None:
        """Start sending the rows of the owned matrices to the ranks that hold them."""
        pieces = [
            whole[route.edges[r] : route.edges[r + 1]].flatten()
            for r in self.ranks
            for route, whole in zip(self.owned, wholes, strict=True)
        ]
        outgoing = torch.cat(pieces) if pieces else self.incoming.new_empty(0)
        self._send(outgoing, self.received, self.sent)

    def rows(self) -> Iterable[Tensor]:
        """This rank's rows of all matrices, flat, once they are back."""
        return self._arrived().split(self.held)

    def _send(self, outgoing: Tensor, sent: list[int], received: list[int]) -> None:
        self.outgoing = outgoing  # lives until it is sent
        self.incoming = outgoing.new_empty(sum(received))
        self.message = dist.all_to_all_single(
            self.incoming, outgoing, received, sent, group=self.circle, async_op=True
        )

    def _arrived(self) -> Tensor:
        assert self.message is not None
        self.message.wait()
        return self.incoming


def overlapped(trips: Iterable[Iterator[None]]) -> None:
    """Run generators that pause while messages fly, each a stage behind the one after it."""
    under_way: list[Iterator[None]] = []
    for trip in trips:
        under_way = _advance([trip, *under_way])
    while under_way:
        under_way = _advance(under_way)


def _advance(trips: list[Iterator[None]]) -> list[Iterator[None]]:
    """The youngest first: its messages leave before the older ones' arithmetic begins."""
    return [trip for trip in trips if next(trip, StopIteration) is not StopIteration]
