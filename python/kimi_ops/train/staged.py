# SPDX-License-Identifier: MIT
"""Forward and backward of a step's micro-batches through the stages of a pipeline, by a schedule of
`torch.distributed.pipelining`.

    rank of stage 0     windows -> hidden values ->                      <- their gradients
    rank of stage 1                               -> hidden, logits, loss

Gradients of micro-batches are added up in their order, and the loss is divided by their number
before the backward: every sum is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from kimi_ops.models.kimi_k2 import Stage
from kimi_ops.train.passes import computed, window_losses
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.settings import TrainSettings


class Staged:
    """Micro-batches through stages, of which this rank has one.

    Parameters
    ----------
    stage : Stage
    settings : TrainSettings
    ranks : Ranks
        Their `stages` are a rank of each.
    """

    def __init__(self, stage: Stage, settings: TrainSettings, ranks: Ranks) -> None:
        self._stage, self._settings, self._ranks = stage, settings, ranks
        self._schedules: dict[tuple[object, ...], PipelineScheduleSingle] = {}

    def step(self, share: Tensor) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        count = self._settings.accumulate
        schedule = self._schedule(self._ranks.schedule, len(share) // count, count, self._mean)
        with _own_errors():
            schedule.step(*self._input(share), **self._target(share, losses), return_outputs=False)
        total = torch.zeros((), dtype=torch.float32, device=share.device)
        for loss in losses:
            total += loss.detach()
        return total, self._stage.auxiliary_loss()

    def losses(self, batches: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for rows, some in groupby(batches, key=len):
            alike, at_once = list(some), self._ranks.layout.pp  # a schedule keeps what it computed
            for first in range(0, len(alike), at_once):
                found += self._judged(alike[first : first + at_once], rows)
        return found

    def _judged(self, batches: list[Tensor], rows: int) -> list[Tensor]:
        losses = [windows.new_zeros(rows, dtype=torch.float32) for windows in batches]
        share = torch.cat(batches)
        # all forwards one after the other
        schedule = self._schedule("GPipe", rows, len(batches), window_losses)
        with _own_errors():
            schedule.eval(*self._input(share), **self._target(share, losses), return_outputs=False)
        return losses

    def _input(self, windows: Tensor) -> list[Tensor]:
        return [windows[:, :-1]] if self._stage.first else []

    def _target(self, windows: Tensor, losses: list[Tensor]) -> dict[str, Any]:
        """Where the loss is: the windows, and the list that the losses are put into."""
        return {"target": windows, "losses": losses} if self._stage.last else {}

    def _mean(self, logits: Tensor, windows: Tensor) -> Tensor:
        return window_losses(logits, windows).mean() / self._settings.accumulate

    def _schedule(
        self, name: str, rows: int, count: int, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> PipelineScheduleSingle:
        """The schedule of `count` micro-batches of `rows` windows, whose buffers stay."""
        key = name, rows, count, loss
        if key not in self._schedules:
            stage, ranks, config = self._stage, self._ranks, self._stage.config
            weight = next(stage.parameters())

            def like(*width: int, dtype: torch.dtype = weight.dtype) -> Tensor:
                shape, wanted = (rows, self._settings.window, *width), dtype.is_floating_point
                return torch.empty(shape, dtype=dtype, device="meta", requires_grad=wanted)

            ids, hidden = like(dtype=torch.int64), like(config.hidden_size)
            part = pipelining.PipelineStage(
                _Computed(stage, self._settings),
                ranks.stage,
                ranks.layout.pp,
                weight.device,
                input_args=ids if stage.first else hidden,
                output_args=like(config.vocab_size) if stage.last else hidden,
                group=ranks.stages,
            )
            kind = getattr(pipelining, f"Schedule{name}")
            self._schedules[key] = kind(part, count, loss_fn=loss, scale_grads=False)
        return self._schedules[key]


class _Computed(nn.Module):
    """A stage whose forward, and nothing else, computes in the settings' dtype."""

    def __init__(self, stage: Stage, settings: TrainSettings) -> None:
        super().__init__()
        self.stage, self._settings = stage, settings

    def forward(self, x: Tensor) -> Tensor:
        with computed(self._settings, x.device):
            return self.stage(x)


@contextmanager
def _own_errors() -> Iterator[None]:
    """What a stage raises, without the RuntimeErrors that a schedule puts around it."""
    found: BaseException | None = None
    try:
        yield
    except RuntimeError as error:
        found = error
    while type(found) is RuntimeError and found.__cause__ is not None:
        found = found.__cause__
    if found is not None:
        raise found
