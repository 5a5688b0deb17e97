# SPDX-License-Identifier: MIT
"""The updates of MuonClip for what one process owns of a group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_ops.optim import engine
from kimi_ops.optim.learning_rate import adjusted_lr
from kimi_ops.optim.muon_blocks import blocks, ns_options
from kimi_ops.optim.muon_shards import Shards
from kimi_ops.optim.newton_schulz import as_matrices, newton_schulz

_BATCH_ELEMENTS = 1 << 26  # of the updates that go through Newton-Schulz at once


@dataclass
class Work:
    """One parameter, or the rows of it that this rank owns, with what its update needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    pieces: range  # of the parameter among the squared norms: it moves where all are finite


def measured(work: list[tuple[list[Work], dict[str, Any]]], shards: Shards) -> Tensor:
    """The squared norms of the gradients of one process, [pieces], zeros where there is none.

    AdamW groups whose norm does not clip are left to the update itself, which looks for what is
    not finite while gradients are in a cache. Of Muon groups, too, only that is asked: a whole
    gradient counts as one piece.
    """
    device = shards.pieces[0].param.device if shards.pieces else torch.device("cpu")
    squares = torch.zeros(len(shards.pieces), dtype=torch.float64, device=device)
    grads: list[Tensor] = []
    places: list[range] = []
    lengths: list[list[int]] = []
    for items, group in work:
        if _measures(group):
            continue
        for item in items:
            clips = group["algorithm"] == "adamw"
            numbers = item.pieces if clips else item.pieces[:1]
            sizes = [shards.pieces[i].shape.numel() for i in numbers]
            grads.append(item.grad)
            places.append(numbers)
            lengths.append(sizes if clips else [item.grad.numel()])
    engine.squares_(squares, grads, places, lengths)
    return squares


def _measures(group: dict[str, Any]) -> bool:
    return group["algorithm"] == "adamw" and group["max_grad_norm"] is None


def muon_update(work: list[Work], group: dict[str, Any], squares: Tensor) -> None:
    """Momentum, Newton-Schulz of many parameters at once, decay and step."""
    for batch in _batches(work, group):
        _step(batch, group, squares)


def adamw_update(
    work: list[Work], group: dict[str, Any], squares: Tensor, clip: Tensor | None, alone: bool
) -> None:
    """AdamW; `clip` is a factor of all gradients. `alone`: `squares` came from `measured`."""
    engine.adamw_(
        [item.param for item in work],
        [item.grad for item in work],
        [item.state["exp_avg"] for item in work],
        [item.state["exp_avg_sq"] for item in work],
        [item.state["step"] for item in work],
        lr=_scalar(group, "lr"),
        betas=group["betas"],
        eps=group["adamw_eps"],
        weight_decay=_scalar(group, "weight_decay"),
        maximize=group["maximize"],
        cautious=group["cautious_weight_decay"],
        squares=squares,
        pieces=[item.pieces for item in work],
        measure=alone and _measures(group),
        scale=clip,
    )


def _scalar(group: dict[str, Any], key: str) -> engine.Scalar:
    """A number, or a tensor that stays on its device."""
    value = group[key]
    return value if group["capturable"] and isinstance(value, Tensor) else float(value)


def _batches(work: list[Work], group: dict[str, Any]) -> Iterator[list[Work]]:
    """Work of one device that goes through Newton-Schulz together."""
    limit = group["ns_max_batch"]
    batch: list[Work] = []
    size = 0
    for item in work:
        if limit is None:
            more, bound = item.param.numel(), _BATCH_ELEMENTS
        else:
            more, bound = sum(b.shape[:-2].numel() for b in blocks(item.param, group)), limit
        apart = group["foreach"] is False or size + more > bound
        if batch and (apart or item.param.device != batch[0].param.device):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += more
    if batch:
        yield batch


def _step(work: list[Work], group: dict[str, Any], squares: Tensor) -> None:
    lr = _scalar(group, "lr")
    of_lr = 1.0 if isinstance(lr, Tensor) else lr
    targets, rates, pieces = [], [], []
    for item in work:
        for part in blocks(item.param, group):
            rate = adjusted_lr(of_lr, group["adjust_lr_fn"], (part.shape[-2], part.shape[-1]))
            matrices = as_matrices(part)
            targets += matrices
            rates += [rate] * len(matrices)
            pieces += [item.pieces] * len(matrices)
    updates = engine.momenta_(
        [item.grad for item in work],
        [item.state["momentum_buffer"] for item in work],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        squares=squares,
        pieces=[item.pieces for item in work],
    )
    cut = [x for update in updates for part in blocks(update, group) for x in as_matrices(part)]
    images = newton_schulz(cut, **ns_options(group))
    engine.apply_(
        targets,
        images,
        rates,
        lr=lr,
        weight_decay=_scalar(group, "weight_decay"),
        cautious=group["cautious_weight_decay"],
        squares=squares,
        pieces=pieces,
    )
