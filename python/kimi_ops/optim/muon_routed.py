# SPDX-License-Identifier: MIT
"""The updates of what travels between ranks, bucket by bucket: to its owner, there, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.optim.muon_exchange import Copies, Rows, overlapped
from kimi_ops.optim.muon_routes import Route, buckets
from kimi_ops.optim.muon_update import (
    Work,
    apply,
    batches,
    matrices_of,
    momenta,
    muon_update,
    orthogonal,
    parts_of,
)

_Item = tuple[Work, dict[str, Any]]


def routed_update(
    work: list[tuple[list[Work], dict[str, Any]]],
    copies: Sequence[tuple[Route, Tensor]],
    squares: Tensor,
) -> None:
    """As `muon_update` for what has a route, of all groups together. `copies` are all that every
    rank holds and that moves, also what others own and what has moved already: they are the same on
    all ranks afterwards."""
    routed = {
        item.route: (item, group)
        for items, group in work
        for item in items
        if item.route is not None and group["algorithm"] == "muon"
    }
    rows = [route for route in routed if not route.is_copy]
    keys: list[Any] = []
    for item, _ in map(routed.__getitem__, rows):
        double = item.state["momentum_buffer"].dtype == torch.float64
        keys.append((item.param.device, double))  # of the updates, whatever the momentum's dtype
    trips = [_rows_trip([rows[i] for i in b], routed, squares) for b in buckets(rows, keys)]
    keys = [(copy.dtype, copy.device) for _, copy in copies]
    together = buckets([route for route, _ in copies], keys)
    trips += [_copies_trip([copies[i] for i in b], routed, squares) for b in together]
    overlapped(trips)


def _rows_trip(routes: list[Route], routed: dict[Route, _Item], squares: Tensor) -> Iterator[None]:
    """One bucket of which every rank moves its rows; pauses while messages fly."""
    work = [routed[route] for route in routes]
    exchange = Rows(routes, "updates")
    updates: dict[int, Tensor] = {}
    for group, members in _by_group(group for _, group in work):
        done = momenta([work[i][0] for i in members], group, squares)
        updates |= dict(zip(members, done, strict=True))
    exchange.there(updates.pop(i) for i in range(len(work)))
    yield
    wholes = exchange.wholes()
    for group, members in _by_group(routed[route][1] for route in exchange.owned):
        for batch in batches([wholes[i] for i in members], group):
            found = [wholes[members[i]] for i in batch]
            cut = [x for whole in found for x in matrices_of(whole, group)]
            for x, image in zip(cut, orthogonal(found, group), strict=True):
                x.copy_(image)
    exchange.back(wholes)
    yield
    rows = exchange.rows()
    for group, members in _by_group(group for _, group in work):
        items = [work[i][0] for i in members]
        images = [
            matrix
            for i, item in zip(members, items, strict=True)
            for matrices, _ in parts_of(rows[i].view(item.param.shape), group, item.route)
            for matrix in matrices
        ]
        apply(items, images, group, squares)


def _copies_trip(
    copies: list[tuple[Route, Tensor]], routed: dict[Route, _Item], squares: Tensor
) -> Iterator[None]:
    """One bucket of which the owners move all; pauses while messages fly."""
    exchange = Copies([route for route, _ in copies], "parameters")
    work = [routed[route] for route in exchange.owned if route in routed]
    for group, members in _by_group(group for _, group in work):
        muon_update([work[i][0] for i in members], group, squares)
    exchange.back(copy for _, copy in copies)
    yield
    for (route, copy), came in zip(copies, exchange.rows(), strict=True):
        if route.owner != exchange.circle.rank:
            copy.copy_(came.view(copy.shape))


def _by_group(groups: Iterable[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], list[int]]]:
    """The groups that occur, each with the positions at which it does."""
    found: dict[int, tuple[dict[str, Any], list[int]]] = {}
    for i, group in enumerate(groups):
        found.setdefault(id(group), (group, []))[1].append(i)
    return found.values()
