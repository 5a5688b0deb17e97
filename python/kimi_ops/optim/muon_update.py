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
from kimi_ops.optim.muon_blocks import aligned, blocks, ns_options
from kimi_ops.optim.muon_routes import Route
from kimi_ops.optim.muon_shards import Shards
from kimi_ops.optim.newton_schulz import as_matrices, newton_schulz

# Of the updates that go through Newton-Schulz at once, in about 12 bytes each; elsewhere than on a
# GPU, which many matrices fill, they are to be few beside the model.
_BATCH_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 23}


@dataclass(slots=True)
class Work:
    """One parameter (its master, where it has one), or the rows of it that this rank owns, with
    what its update needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    pieces: range  # of the parameter among the squared norms: it moves where all are finite
    route: Route | None = None  # of what travels
    heads: int | None = None  # among these rows, where that is not the group's num_heads
    shown: Tensor | None = None  # the 16-bit rows that follow a master


def _rounded(work: Iterable[Work]) -> None:
    """Give parameters what their masters have become."""
    pairs = [(item.shown, item.param) for item in work if item.shown is not None]
    if pairs:
        shown, masters = map(list, zip(*pairs, strict=True))
        torch._foreach_copy_(shown, masters)


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
        grads += [item.grad for item in items]
        if group["algorithm"] == "adamw":
            places += [item.pieces for item in items]
            lengths += [[shards.pieces[i].shape.numel() for i in item.pieces] for item in items]
        else:
            places += [item.pieces[:1] for item in items]
            lengths += [[item.grad.numel()] for item in items]
    if grads:
        engine.squares_(squares, grads, places, lengths)
    return squares


def _measures(group: dict[str, Any]) -> bool:
    return group["algorithm"] == "adamw" and group["max_grad_norm"] is None


def muon_update(work: list[Work], group: dict[str, Any], squares: Tensor) -> None:
    """Momentum, Newton-Schulz of many parameters at once, decay and step."""
    for heads in dict.fromkeys(item.heads for item in work if item.heads != 0):
        same = [item for item in work if item.heads == heads]
        cut = group if heads is None else {**group, "num_heads": heads}
        for batch in batches([item.param for item in same], cut):
            items = [same[i] for i in batch]
            updates = aligned(momenta(items, cut, squares), [item.param for item in items])
            images = orthogonal(updates, cut)
            apply(items, images, cut, squares)


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
    _rounded(work)


def _scalar(group: dict[str, Any], key: str) -> engine.Scalar:
    """A number, or a tensor that stays on its device."""
    value = group[key]
    return value if group["capturable"] and isinstance(value, Tensor) else float(value)


def batches(params: Sequence[Tensor], group: dict[str, Any]) -> Iterator[list[int]]:
    """Numbers of parameters of one device that go through Newton-Schulz together."""
    limit = group["ns_max_batch"]
    batch: list[int] = []
    size = 0
    for i, param in enumerate(params):
        if limit is None:
            more, bound = param.numel(), _BATCH_ELEMENTS.get(param.device.type, 1 << 26)
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


def momenta(work: list[Work], group: dict[str, Any], squares: Tensor) -> list[Tensor]:
    """Move the momenta; what Newton-Schulz takes of each, in new tensors."""
    return engine.momenta_(
        [item.grad for item in work],
        [item.state["momentum_buffer"] for item in work],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        squares=squares,
        pieces=[item.pieces for item in work],
    )


def matrices_of(x: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """All matrices of x, [rows, in], as views."""
    return [matrix for part in blocks(x, group) for matrix in as_matrices(part)]


def parts_of(
    x: Tensor, group: dict[str, Any], route: Route | None
) -> list[tuple[list[Tensor], torch.Size]]:
    """What one rate serves of a parameter, as matrices, with the shape that the rate is of."""
    if route is None:
        parts = [(block, block.shape[-2:]) for block in blocks(x, group)]
    else:
        parts = route.parts(x, group)
    return [(as_matrices(part), shape) for part, shape in parts]


def orthogonal(updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The images of all matrices of the updates."""
    cut = [x for update in updates for x in matrices_of(update, group)]
    return newton_schulz(cut, **ns_options(group))


def apply(work: list[Work], images: list[Tensor], group: dict[str, Any], squares: Tensor) -> None:
    """Decay, and a step along `images`, one for each part of the parameters."""
    lr = _scalar(group, "lr")
    of_lr = 1.0 if isinstance(lr, Tensor) else lr
    targets, rates, pieces = [], [], []
    for item in work:
        for matrices, shape in parts_of(item.param, group, item.route):
            rate = adjusted_lr(of_lr, group["adjust_lr_fn"], (shape[0], shape[1]))
            targets += matrices
            rates += [rate] * len(matrices)
            pieces += [item.pieces] * len(matrices)
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
    _rounded(work)
