# SPDX-License-Identifier: MIT
"""Who works on what several ranks have: its owner, its turn, and who holds which rows of it.

A circle of ranks is the process group, whose ranks have copies, or one dimension of a mesh, whose
ranks have rows. Replicas of it (HSDP) each do their own exchange and have equal bits, as their
gradients do: to split the matrices between them, too, would send every update once more, between
the ranks that are the farthest apart, and a replica could not go on without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.optim.muon_blocks import blocks
from kimi_ops.optim.muon_circle import Circle
from kimi_ops.optim.muon_mesh import circle_of, edges_of

Bands = tuple[tuple[int, int, torch.Size], ...]

_BUCKET = 1 << 25  # elements that a rank sends at once


class Owners:
    """Shares work out: the most expensive first, to the rank that has the least to do."""

    def __init__(self, ranks: int) -> None:
        self.loads, self._taken = [0] * ranks, [0] * ranks

    def give(self, costs: Sequence[int]) -> list[tuple[int, int]]:
        """For each cost the rank that takes it, and how much that has taken before."""
        found = [(0, 0)] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            rank = min(range(len(self.loads)), key=lambda rank: (self.loads[rank], rank))
            found[index] = rank, self._taken[rank]
            self.loads[rank] += costs[index]
            self._taken[rank] += 1
        return found


@dataclass(frozen=True)
class Route:
    """Of something that travels: who holds which rows, who works on it, and when."""

    circle: Circle
    owner: int
    turn: int  # how much its owner takes before
    shape: torch.Size
    edges: tuple[int, ...] | None = None  # rank r holds rows edges[r] .. edges[r + 1]; None: all
    bands: Bands | None = None  # of this rank; None: it has whole matrices, or columns are cut

    @property
    def is_copy(self) -> bool:
        return self.edges is None

    def numel(self, rank: int) -> int:
        if self.edges is None:
            return self.shape.numel()
        return (self.edges[rank + 1] - self.edges[rank]) * self.shape[1:].numel()

    def rows(self, rank: int, whole: Tensor) -> Tensor:
        return whole if self.edges is None else whole[self.edges[rank] : self.edges[rank + 1]]

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


def row_route(param: Tensor, group: dict[str, Any], circle: Circle, owner: int, turn: int) -> Route:
    """Of a parameter whose rows the ranks of a circle share."""
    edges, rank = edges_of(param, circle.world), circle.rank
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


def buckets(routes: Sequence[Route], keys: Sequence[Any]) -> Iterator[list[int]]:
    """Numbers of the routes that travel together, ascending by owner: one circle and key, whole
    turns, in which all ranks have about as much to do; in an order that all ranks share."""
    queues: dict[Any, dict[int, list[int]]] = {}
    for i, (route, key) in enumerate(zip(routes, keys, strict=True)):
        queues.setdefault((route.circle, key), {}).setdefault(route.turn, []).append(i)
    for turns in queues.values():
        bucket: list[int] = []
        size = 0
        for turn in sorted(turns):
            more = sum(routes[i].shape.numel() for i in turns[turn])
            first = routes[turns[turn][0]]
            limit = _BUCKET * (1 if first.is_copy else first.circle.world)
            if bucket and size + more > limit:
                yield sorted(bucket, key=lambda i: routes[i].owner)
                bucket, size = [], 0
            bucket += turns[turn]
            size += more
        yield sorted(bucket, key=lambda i: routes[i].owner)
