# SPDX-License-Identifier: MIT
"""The updates of MuonClip for what one process owns of a group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kimi_ops import _muon
from kimi_ops.muon_blocks import blocks, ns_options
from kimi_ops.newton_schulz import newton_schulz
from kimi_ops.reference.muon_clip import adjusted_lr

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
    for item in work:
        grad = item.grad if clip is None else item.grad * clip.to(item.grad.dtype)
        _muon.adamw_(
            item.param,
            grad,
            item.state["exp_avg"],
            item.state["exp_avg_sq"],
            int(item.state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["adamw_eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            cautious=group["cautious_weight_decay"],
            alive=item.alive,
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
    cut = []
    for item in work:
        update = _muon.momentum_(
            item.grad,
            item.state["momentum_buffer"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            alive=item.alive,
        )
        cut.append(blocks(update, group))
    images = iter(newton_schulz([block for part in cut for block in part], **ns_options(group)))
    lr = float(group["lr"])
    for item in work:
        for target in blocks(item.param, group):
            _muon.apply_(
                target,
                next(images),
                lr=lr,
                rate=adjusted_lr(lr, group["adjust_lr_fn"], (target.shape[-2], target.shape[-1])),
                weight_decay=group["weight_decay"],
                cautious=group["cautious_weight_decay"],
                alive=item.alive,
            )
