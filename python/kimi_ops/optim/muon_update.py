# SPDX-License-Identifier: MIT
"""The updates of MuonClip for what one process owns of a group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_ops.optim import engine
from kimi_ops.optim.learning_rate import adjusted_lr
from kimi_ops.optim.muon_blocks import blocks, ns_options
from kimi_ops.optim.muon_routes import Exchange, Route, buckets, overlapped
from kimi_ops.optim.newton_schulz import as_matrices, newton_schulz

_BATCH_ELEMENTS = 1 << 26  # of the updates that go through Newton-Schulz at once


@dataclass
class Work:
    """One parameter, or the rows of it that this rank owns, with what its update needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    alive: Tensor | None  # on devices: whether the gradient is finite
    route: Route | None = None  # of rows of matrices that lie on several ranks


def muon_update(work: list[Work], group: dict[str, Any]) -> None:
    """Momentum, Newton-Schulz of many parameters at once, decay and step."""
    for batch in _batches([item.param for item in work], group):
        items = [work[i] for i in batch]
        _apply(items, _orthogonal(_momenta(items, group), group), group)


def routed_update(work: list[tuple[Work, dict[str, Any]]]) -> None:
    """The same for rows of matrices that lie on several ranks, of any groups together."""
    routes = [item.route for item, _ in work if item.route is not None]
    keys = []
    for item, _ in work:
        double = item.state["momentum_buffer"].dtype == torch.float64
        keys.append((item.param.device, double))  # of the updates, whatever the momentum's dtype
    overlapped(_trip([work[i] for i in bucket]) for bucket in buckets(routes, keys))


def _trip(work: list[tuple[Work, dict[str, Any]]]) -> Iterator[None]:
    """One bucket; pauses while its messages fly."""
    routes = [item.route for item, _ in work if item.route is not None]
    order = sorted(range(len(work)), key=lambda i: routes[i].owner)
    work, routes = [work[i] for i in order], [routes[i] for i in order]
    exchange = Exchange(routes)
    updates: dict[int, Tensor] = {}
    for group, members in _by_group(group for _, group in work):
        done = _momenta([work[i][0] for i in members], group)
        updates |= dict(zip(members, done, strict=True))
    exchange.there([updates.pop(i) for i in range(len(work))])
    yield
    wholes = exchange.wholes()
    mine = [group for item, group in work if item.route and item.route.owner == exchange.rank]
    for group, members in _by_group(mine):
        for batch in _batches([wholes[i] for i in members], group):
            found = [wholes[members[i]] for i in batch]
            cut = [x for whole in found for x in _matrices(whole, group)]
            for x, image in zip(cut, _orthogonal(found, group), strict=True):
                x.copy_(image)
    exchange.back(wholes)
    yield
    rows = list(exchange.rows())
    for group, members in _by_group(group for _, group in work):
        items = [work[i][0] for i in members]
        images = [
            matrix
            for i, item in zip(members, items, strict=True)
            for matrices, _ in _parts(rows[i].view(item.param.shape), group, item.route)
            for matrix in matrices
        ]
        _apply(items, images, group)


def _by_group(groups: Iterable[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], list[int]]]:
    """The groups that occur, each with the positions at which it does."""
    found: dict[int, tuple[dict[str, Any], list[int]]] = {}
    for i, group in enumerate(groups):
        found.setdefault(id(group), (group, []))[1].append(i)
    return found.values()


def adamw_update(work: list[Work], group: dict[str, Any], clip: Tensor | None) -> None:
    """AdamW; `clip` is a factor of all gradients."""
    engine.adamw_(
        [item.param for item in work],
        [item.grad if clip is None else item.grad * clip.to(item.grad.dtype) for item in work],
        [item.state["exp_avg"] for item in work],
        [item.state["exp_avg_sq"] for item in work],
        [int(item.state["step"]) for item in work],
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["adamw_eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        cautious=group["cautious_weight_decay"],
        alive=[item.alive for item in work],
    )


def _batches(params: Sequence[Tensor], group: dict[str, Any]) -> Iterator[list[int]]:
    """Numbers of parameters of one device that go through Newton-Schulz together."""
    limit = group["ns_max_batch"]
    batch: list[int] = []
    size = 0
    for i, param in enumerate(params):
        if limit is None:
            more, bound = param.numel(), _BATCH_ELEMENTS
        else:
            more, bound = sum(b.shape[:-2].numel() for b in blocks(param, group)), limit
        apart = group["foreach"] is False or size + more > bound
        if batch and (apart or param.device != params[batch[0]].device):
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += more
    if batch:
        yield batch


def _momenta(work: list[Work], group: dict[str, Any]) -> list[Tensor]:
    """Move the momenta; what Newton-Schulz takes of each, in new tensors."""
    return engine.momenta_(
        [item.grad for item in work],
        [item.state["momentum_buffer"] for item in work],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        alive=[item.alive for item in work],
    )


def _matrices(x: Tensor, group: dict[str, Any]) -> list[Tensor]:
    return [matrix for part in blocks(x, group) for matrix in as_matrices(part)]


def _parts(
    x: Tensor, group: dict[str, Any], route: Route | None
) -> list[tuple[list[Tensor], torch.Size]]:
    """What one rate serves of a parameter, as matrices, with the shape that the rate is of."""
    if route is None:
        parts = [(block, block.shape[-2:]) for block in blocks(x, group)]
    else:
        parts = route.parts(x, group)
    return [(as_matrices(part), shape) for part, shape in parts]


def _orthogonal(updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The images of all matrices of the updates."""
    cut = [x for update in updates for x in _matrices(update, group)]
    return newton_schulz(cut, **ns_options(group))


def _apply(work: list[Work], images: list[Tensor], group: dict[str, Any]) -> None:
    """Decay, and a step along `images`, one for each part of the parameters."""
    lr = float(group["lr"])
    targets, rates, alive = [], [], []
    for item in work:
        for matrices, shape in _parts(item.param, group, item.route):
            rate = adjusted_lr(lr, group["adjust_lr_fn"], (shape[0], shape[1]))
            targets += matrices
            rates += [rate] * len(matrices)
            alive += [item.alive] * len(matrices)
    engine.apply_(
        targets,
        images,
        rates,
        lr=lr,
        weight_decay=group["weight_decay"],
        cautious=group["cautious_weight_decay"],
        alive=alive,
    )
