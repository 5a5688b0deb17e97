# SPDX-License-Identifier: MIT
"""One training step of a Kimi K2 model, and its validation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.muon_clip import MuonClip, QKClip, muon_param_groups
from kimi_ops.train.data import VOCABULARY
from kimi_ops.train.schedule import warmup_stable_decay
from kimi_ops.train.settings import TrainSettings


@dataclass(frozen=True)
class StepStatistics:
    """What one step showed.

    Attributes
    ----------
    loss : float
        Cross entropy, nats a byte, before the update.
    auxiliary : float
        Sequence balance loss of all layers.
    lr : float
        Learning rate of the step.
    max_logit : float
        Largest attention logit of all heads, before the clip.
    clipped_heads : int
        Heads that QK-Clip scaled.
    load_max_over_mean : float
        Tokens of the busiest expert over the mean, the worst layer's.
    load_layers : list of float
        The same for each layer.
    """

    loss: float
    auxiliary: float
    lr: float
    max_logit: float
    clipped_heads: int
    load_max_over_mean: float
    load_layers: list[float]


def byte_config(settings: TrainSettings) -> KimiK2Config:
    """The preset with one token for each byte value."""
    config = getattr(KimiK2Config, settings.preset)()
    if settings.window > config.max_position_embeddings:
        raise ValueError(
            f"train: window: expected at most the {config.max_position_embeddings} positions of "
            f"{settings.preset}, got {settings.window}; "
            "shorten it"
        )
    return dataclasses.replace(config, vocab_size=VOCABULARY)


class Trainer:
    """Model, optimizer and what happens between them in a step.

    Forward and backward of every micro-batch; clip the AdamW gradients; MuonClip with QK-Clip;
    expert biases; reset.
    """

    def __init__(self, settings: TrainSettings, model: KimiK2 | None = None) -> None:
        self.settings = settings
        if model is None:
            model = KimiK2(byte_config(settings))
            model.init_weights(settings.seed)
        self.model = model.train()
        self.qk_clip = QKClip(self.model.attention_layers(), tau=settings.tau)
        self.optimizer = MuonClip(
            muon_param_groups(self.model),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            ns_dtype=settings.ns_dtype,
            qk_clip=self.qk_clip,
        )
        self._warmup = round(settings.steps * settings.warmup)
        groups = [g for g in self.optimizer.param_groups if g["algorithm"] == "adamw"]
        self._adamw_parameters = [p for group in groups for p in group["params"]]

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
        """Train on batch [sequences * accumulate, window + 1] int64 as step number `step` (from 0).

        Raises
        ------
        FloatingPointError
            The loss or a gradient is not finite; nothing was updated.
        """
        settings = self.settings
        micro_batches = batch.split(settings.sequences)
        total, auxiliary = torch.zeros(()), torch.zeros(())
        for micro in micro_batches:
            loss = self._loss(micro) / len(micro_batches)
            balance = self.model.auxiliary_loss() / len(micro_batches)
            (loss + balance).backward()
            total += loss.detach()
            auxiliary += balance.detach()
        wrong = self._not_finite(total)
        if wrong is not None:
            self._forget()
            raise FloatingPointError(
                f"train: step {step + 1}: expected finite numbers, got {wrong}; lower the learning "
                f"rate (lr {settings.lr}) and resume from the last checkpoint"
            )
        factor = self.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        torch.nn.utils.clip_grad_norm_(self._adamw_parameters, settings.clip_norm)
        self.optimizer.step()
        loads = []
        for moe in self.model.moe_layers():
            load = moe.tokens_per_expert
            loads.append(float(load.max() / load.float().mean()))
            update_expert_bias_(moe.gate.e_score_correction_bias, load, self.bias_rate(step))
        self._forget()
        maxima, gamma = self.qk_clip.max_logits, self.qk_clip.gamma
        assert maxima is not None and gamma is not None  # set by the optimizer's step
        return StepStatistics(
            loss=float(total),
            auxiliary=float(auxiliary),
            lr=settings.lr * factor,
            max_logit=float(maxima.max()),
            clipped_heads=int((gamma < 1).sum()),
            load_max_over_mean=max(loads),
            load_layers=loads,
        )

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def _not_finite(self, loss: Tensor) -> str | None:
        """The loss or the first gradient that must not reach a weight."""
        if not torch.isfinite(loss):
            return f"the loss {float(loss)}"
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        norms = torch.stack([grad.norm() for _, grad in named])
        if torch.isfinite(norms).all():
            return None
        first = int((~torch.isfinite(norms)).nonzero()[0])
        return f"a gradient of norm {float(norms[first])} at {named[first][0]}"

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.reset_statistics()

    @torch.no_grad()
    def validate(self, sequences: Tensor) -> float:
        """Mean cross entropy on sequences [n, window + 1], nats a byte; the statistics of training
        stay."""
        self.model.eval()
        self._track(False)
        total = 0.0
        for batch in sequences.split(self.settings.sequences):
            total += float(self._loss(batch)) * len(batch)
        self._track(True)
        self.model.train()
        return total / len(sequences)

    def _track(self, enabled: bool) -> None:
        for layer in self.model.attention_layers():
            layer.track_max_logits = enabled
