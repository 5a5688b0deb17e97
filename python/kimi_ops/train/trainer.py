# SPDX-License-Identifier: MIT
"""One training step of a Kimi K2 model, and its validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kimi_ops import QKClip, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2, Stage
from kimi_ops.models.kimi_k2.recompute import set_storage
from kimi_ops.train.layout import check_batch
from kimi_ops.train.model import drawn_model
from kimi_ops.train.optimizer import optimizer_of
from kimi_ops.train.passes import Passes, Whole
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.schedule import warmup_stable_decay
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.statistics import Census, StepStatistics


class Diverged(FloatingPointError):
    """The loss or a gradient of a step is not finite; nothing was updated. `step`
    counts from 1, `lr` is the peak."""

    def __init__(self, step: int, wrong: str, lr: float) -> None:
        super().__init__(
            f"train: step {step}: expected finite numbers, got {wrong}; lower the learning rate "
            f"(lr {lr})"
        )
        self.step = step
        self.lr = lr


class Trainer:
    """Model, optimizer and what happens between them in a step.

    Forward and backward of every micro-batch; MuonClip, which clips the AdamW gradients, with
    QK-Clip; expert biases; reset. The ranks of a stage share each micro-batch, and all ranks call
    every method.

    Parameters
    ----------
    settings : TrainSettings
    model : KimiK2 or Stage, optional
        By default one with the weights of the settings' seed, spread over `ranks`.
    device : torch.device or str
        Of that model.
    ranks : Ranks, optional
        By default this process alone.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: KimiK2 | Stage | None = None,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.settings, self.ranks = settings, Ranks() if ranks is None else ranks
        check_run(settings, self.ranks)
        if model is None:
            model = drawn_model(settings, self.ranks, torch.device(device))
        self.model = model.train()
        set_storage(model, settings.recompute, settings.fp8_activations)
        self.device = next(model.parameters()).device
        self.qk_clip = QKClip(self.model.attention_layers(), tau=settings.tau)
        self.optimizer = optimizer_of(self.model, self.ranks, settings.lr, self.qk_clip)
        self.apply_settings()
        self._warmup = round(settings.steps * settings.warmup)
        self._census = Census(model, self.ranks)
        self._passes = passes_of(model, settings, self.ranks)
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32  # where micro-batches are added up

    def apply_settings(self) -> None:
        """Give the optimizer the settings' numbers; those of a checkpoint may be older."""
        ns_dtype = self.settings.ns_dtype
        if ns_dtype == "auto":
            ns_dtype = "float32" if self.device.type == "cpu" else "float16"
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.settings.weight_decay
            group["ns_dtype"] = ns_dtype
            if group["algorithm"] == "adamw":
                group["max_grad_norm"] = self.settings.clip_norm

    def factor(self, step: int) -> float:
        """Share of the peak learning rate for a step, counted from 0."""
        total = self.settings.steps
        decay = round(total * self.settings.decay)
        return warmup_stable_decay(step, total, warmup=self._warmup, decay=decay)

    def bias_rate(self, step: int) -> float:
        """Step of the expert bias: whole from the start, where balance is worst, small at the
        end."""
        return self.settings.bias_rate * (self.factor(step) if step >= self._warmup else 1.0)

    def step(self, batch: Tensor, step: int) -> StepStatistics:
        """Train on batch [sequences * accumulate, window + 1] int64 as step number `step` (from 0);
        each rank on its share of it.

        Raises
        ------
        Diverged
            The loss or a gradient is not finite; nothing was updated.
        """
        settings = self.settings
        share = self.ranks.share(batch, settings.sequences).to(self.device, non_blocking=True)
        loss, auxiliary = self._passes.step(share)
        lr = settings.lr * self.factor(step)
        numbers = read(self._census.take(loss, auxiliary, settings.tau))
        statistics, wrong = self._census.told(numbers, lr)
        if wrong is not None:
            self._forget()
            raise Diverged(step + 1, wrong, settings.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for moe in self.model.moe_layers():
            bias = moe.gate.e_score_correction_bias
            update_expert_bias_(bias, moe.tokens_per_expert, self.bias_rate(step))
        self._forget()
        return statistics

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.reset_statistics()

    @torch.no_grad()
    def validate(self, sequences: Tensor) -> float:
        """Mean cross entropy on sequences [n, window + 1], nats a byte; the statistics of training
        stay."""
        batches = sequences.to(self.device).split(self.settings.sequences)
        turns = [self.ranks.turns(len(batch), self.device) for batch in batches]
        with self._judging():
            shares = [batch[rows] for batch, (rows, _) in zip(batches, turns, strict=True)]
            found = self._passes.losses(shares)
        losses = torch.zeros(len(sequences), dtype=torch.float64, device=self.device)
        for part, (rows, own), each in zip(
            losses.split(self.settings.sequences), turns, found, strict=True
        ):
            part[rows[:own]] = each[:own].double()  # 0 for those of other ranks
        return read(self.ranks.gather(losses).sum(0).mean(0, keepdim=True))[0]

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """The model in eval mode, whose logits are not tracked."""
        self.model.eval()
        self._track(False)
        try:
            yield
        finally:
            self._track(True)
            self.model.train()

    def _track(self, enabled: bool) -> None:
        for layer in self.model.attention_layers():
            layer.track_max_logits = enabled


def check_run(settings: TrainSettings, ranks: Ranks) -> None:
    """Raise unless the model and the micro-batches of a run fit its ranks."""
    ranks.layers(settings.model_config())
    check_batch(
        settings.sequences,
        settings.accumulate,
        settings.recompute,
        ranks.layout,
        ranks.overlap,
        ranks.schedule,
    )


def passes_of(model: KimiK2 | Stage, settings: TrainSettings, ranks: Ranks) -> Passes:
    """How micro-batches pass through what this rank has of the model."""
    if isinstance(model, KimiK2):
        return Whole(model, settings, ranks)
    from kimi_ops.train.staged import Staged  # loads torch.fx and torch.export

    return Staged(model, settings, ranks)


def read(numbers: Tensor) -> list[float]:
    """The values of a vector: the one place where a step waits for its device."""
    return numbers.tolist()
