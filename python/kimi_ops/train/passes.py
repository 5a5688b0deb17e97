# SPDX-License-Identifier: MIT
"""Forward and backward of a step's micro-batches, where a rank has all layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.models.kimi_k2 import KimiK2, backward_two, forward_two
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.settings import TrainSettings


class Passes(Protocol):
    """What a trainer asks of a model, of its own share of a micro-batch."""

    def step(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the mean over all micro-batches, rows one after the other; the loss and the
        balance losses of what this rank has of the model, 0 for the rest."""

    def losses(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Without gradients: the mean cross entropy [B] of the windows of each batch; 0 where this
        rank has not the end of the model."""


class Whole:
    """Micro-batches one by one, or in twos, side by side.

    Parameters
    ----------
    model : KimiK2
    settings : TrainSettings
    ranks : Ranks
    """

    def __init__(self, model: KimiK2, settings: TrainSettings, ranks: Ranks) -> None:
        self._model, self._settings = model, settings
        self._rows = settings.sequences // ranks.layout.dp
        self._at_once = 2 if ranks.overlap else 1

    def step(self, share: Tensor) -> tuple[Tensor, Tensor]:
        micro_batches = share.split(self._rows)
        total, auxiliary = torch.zeros(2, dtype=torch.float32, device=share.device).unbind()
        for n in range(0, len(micro_batches), self._at_once):
            some = micro_batches[n : n + self._at_once]
            for loss, balance in self._backward(some, len(micro_batches)):
                total += loss
                auxiliary += balance
        return total, auxiliary

    def _backward(self, batches: Sequence[Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
        """Forward and backward of one micro-batch of `count`, or of two side by side; the loss and
        the balance loss of each, as shares of the step's."""
        if len(batches) == 1:
            found = [(self._losses(batches[0]), self._model.auxiliary_loss())]
        else:
            with computed(self._settings, batches[0].device):
                first, second = forward_two(self._model, batches[0][:, :-1], batches[1][:, :-1])
            found = [
                (window_losses(output.logits, batch), output.auxiliary_loss)
                for output, batch in ((first, batches[0]), (second, batches[1]))
            ]
        shares = [(losses.mean() / count, balance / count) for losses, balance in found]
        sums = [loss + balance for loss, balance in shares]
        sums[0].backward() if len(sums) == 1 else backward_two(self._model, sums)
        return [(loss.detach(), balance.detach()) for loss, balance in shares]

    def losses(self, batches: Sequence[Tensor]) -> list[Tensor]:
        return [self._losses(batch) for batch in batches]

    def _losses(self, batch: Tensor) -> Tensor:
        with computed(self._settings, batch.device):
            logits = self._model(batch[:, :-1])
        return window_losses(logits, batch)


def computed(settings: TrainSettings, device: torch.device) -> AbstractContextManager[object]:
    """Products in the settings' dtype, where it is not that of the weights."""
    if settings.dtype == settings.weights:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, settings.dtype))


def window_losses(logits: Tensor, batch: Tensor) -> Tensor:
    """The mean cross entropy [B] of logits [B, S, V] on the next tokens of windows [B, S + 1]."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).mean(1)
