# SPDX-License-Identifier: MIT
"""The updates of MuonClip for what one process owns of a group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kimi_ops.optim import engine
from kimi_ops.optim.learning_rate import adjusted_lr
from kimi_ops.optim.muon_blocks import aligned, blocks, ns_options
from kimi_ops.optim.newton_schulz import as_matrices, newton_schulz

_BATCH_ELEMENTS = 1 << 26  # of the updates that go through Newton-Schulz at once


@dataclass
class Work:
    """One parameter, or the rows of it that this rank owns, with what its update needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    alive: Tensor | None  # on devices: whether the gradient is finite


def muon_update(work: list[Work], group: dict[str, Any]) -> None:
    """Momentum, Newton-Schulz of many parameters at once, decay and step."""
    for batch in _batches(work, group):
        _step(batch, group)


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


def _step(work: list[Work], group: dict[str, Any]) -> None:
    momenta = engine.momenta_(
        [item.grad for item in work],
        [item.state["momentum_buffer"] for item in work],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        alive=[item.alive for item in work],
    )
    updates = aligned(momenta, [item.param for item in work])
    cut = [x for update in updates for part in blocks(update, group) for x in as_matrices(part)]
    images = newton_schulz(cut, **ns_options(group))
    lr = float(group["lr"])
    targets, rates, alive = [], [], []
    for item in work:
        for part in blocks(item.param, group):
            rate = adjusted_lr(lr, group["adjust_lr_fn"], (part.shape[-2], part.shape[-1]))
            matrices = as_matrices(part)
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
