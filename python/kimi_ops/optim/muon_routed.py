# SPDX-License-Identifier: MIT
"""The updates of matrices whose rows lie on several ranks: bucket by bucket there and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kimi_ops.optim.muon_routes import Exchange, buckets, overlapped
from kimi_ops.optim.muon_update import (
    Work,
    apply,
    batches,
    matrices_of,
    momenta,
    orthogonal,
    parts_of,
)

_Item = tuple[Work, dict[str, Any]]


def routed_update(work: list[tuple[list[Work], dict[str, Any]]], squares: Tensor) -> None:
    """As `muon_update` for what has a route, of all groups together."""
    routed = [(item, group) for items, group in work for item in items if item.route is not None]
    routes = [item.route for item, _ in routed if item.route is not None]
    keys = []
    for item, _ in routed:
        double = item.state["momentum_buffer"].dtype == torch.float64
        keys.append((item.param.device, double))  # of the updates, whatever the momentum's dtype
    overlapped(_trip([routed[i] for i in bucket], squares) for bucket in buckets(routes, keys))


def _trip(work: list[_Item], squares: Tensor) -> Iterator[None]:
    """One bucket; pauses while its messages fly."""
    routes = [item.route for item, _ in work if item.route is not None]
    order = sorted(range(len(work)), key=lambda i: routes[i].owner)
    work, routes = [work[i] for i in order], [routes[i] for i in order]
    exchange = Exchange(routes)
    updates: dict[int, Tensor] = {}
    for group, members in _by_group(group for _, group in work):
        done = momenta([work[i][0] for i in members], group, squares)
        updates |= dict(zip(members, done, strict=True))
    exchange.there([updates.pop(i) for i in range(len(work))])
    yield
    wholes = exchange.wholes()
    mine = [group for item, group in work if item.route and item.route.owner == exchange.rank]
    for group, members in _by_group(mine):
        for batch in batches([wholes[i] for i in members], group):
            found = [wholes[members[i]] for i in batch]
            cut = [x for whole in found for x in matrices_of(whole, group)]
            for x, image in zip(cut, orthogonal(found, group), strict=True):
                x.copy_(image)
    exchange.back(wholes)
    yield
    rows = list(exchange.rows())
    for group, members in _by_group(group for _, group in work):
        items = [work[i][0] for i in members]
        images = [
            matrix
            for i, item in zip(members, items, strict=True)
            for matrices, _ in parts_of(rows[i].view(item.param.shape), group, item.route)
            for matrix in matrices
        ]
        apply(items, images, group, squares)


def _by_group(groups: Iterable[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], list[int]]]:
    """The groups that occur, each with the positions at which it does."""
    found: dict[int, tuple[dict[str, Any], list[int]]] = {}
    for i, group in enumerate(groups):
        found.setdefault(id(group), (group, []))[1].append(i)
    return found.values()
