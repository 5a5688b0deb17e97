# SPDX-License-Identifier: MIT
"""One training step of a Kimi K2 model, and its validation."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import MuonClip, QKClip, muon_param_groups, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.reference.qk_clip import clip_factor
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

    Forward and backward of every micro-batch; clip the AdamW gradients; MuonClip with QK-Clip;
    expert biases; reset.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: KimiK2 | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings
        if model is None:
            model = KimiK2(settings.model_config(), device=device)
            model.init_weights(settings.seed)
        self.model = model.train()
        self.device = model.lm_head.weight.device
        self.qk_clip = QKClip(self.model.attention_layers(), tau=settings.tau)
        groups = muon_param_groups(self.model)
        self.optimizer = MuonClip(groups, lr=settings.lr, qk_clip=self.qk_clip)
        self.apply_settings()
        self._warmup = round(settings.steps * settings.warmup)
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        adamw = [g["params"] for g in self.optimizer.param_groups if g["algorithm"] == "adamw"]
        self._adamw_parameters = [p for group in adamw for p in group]

    def apply_settings(self) -> None:
        """Give the optimizer the settings' numbers; those of a checkpoint may be older."""
        ns_dtype = self.settings.ns_dtype
        if ns_dtype == "auto":
            ns_dtype = "float32" if self.device.type == "cpu" else "float16"
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.settings.weight_decay
            group["ns_dtype"] = ns_dtype

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
        Diverged
            The loss or a gradient is not finite; nothing was updated.
        """
        settings = self.settings
        micro_batches = batch.to(self.device, non_blocking=True).split(settings.sequences)
        total, auxiliary = torch.zeros(2, device=self.device).unbind()
        for micro in micro_batches:
            loss = self._loss(micro) / len(micro_batches)
            balance = self.model.auxiliary_loss() / len(micro_batches)
            (loss + balance).backward()
            total += loss.detach()
            auxiliary += balance.detach()
        gradients = {n: p.grad for n, p in self._named if p.grad is not None}
        norms = dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
        statistics = self._statistics(step, total, auxiliary, norms)
        factor = self.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        torch.nn.utils.clip_grad_norm_(self._adamw_parameters, settings.clip_norm)
        self.optimizer.step()
        for moe in self.model.moe_layers():
            bias = moe.gate.e_score_correction_bias
            update_expert_bias_(bias, moe.tokens_per_expert, self.bias_rate(step))
        self._forget()
        return statistics

    def _loss(self, batch: Tensor) -> Tensor:
        with self._compute():
            logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def _compute(self) -> AbstractContextManager[object]:
        """Products in the settings' dtype; weights, router, norms and moments stay fp32."""
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.dtype))

    @torch.no_grad()
    def _statistics(
        self, step: int, loss: Tensor, auxiliary: Tensor, norms: dict[str, Tensor]
    ) -> StepStatistics:
        """All numbers of a step in one tensor, read once, before anything is updated.

        Raises
        ------
        Diverged
            The loss or a gradient's norm is not finite.
        """
        maxima = torch.stack([layer.max_logits for layer in self.model.attention_layers()])
        loads = torch.stack([moe.tokens_per_expert for moe in self.model.moe_layers()])
        clipped = (clip_factor(maxima, self.settings.tau) < 1).sum()
        parts = (loss, auxiliary, maxima.max(), clipped.float())
        worst = loads.amax(dim=1) / loads.float().mean(dim=1)
        numbers = read(torch.cat((torch.stack(parts), worst, torch.stack(list(norms.values())))))
        (total, balance, largest, heads), rest = numbers[:4], numbers[4:]
        layers, lengths = rest[: len(loads)], rest[len(loads) :]
        wrong = [f"the loss {total}"] if not math.isfinite(total) else []
        for name, length in zip(norms, lengths, strict=True):
            if not math.isfinite(length):
                wrong.append(f"a gradient of norm {length} at {name}")
        if wrong:
            self._forget()
            raise Diverged(step + 1, wrong[0], self.settings.lr)
        return StepStatistics(
            loss=total,
            auxiliary=balance,
            lr=self.settings.lr * self.factor(step),
            max_logit=largest,
            clipped_heads=int(heads),
            load_max_over_mean=max(layers),
            load_layers=layers,
        )

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.reset_statistics()

    @torch.no_grad()
    def validate(self, sequences: Tensor) -> float:
        """Mean cross entropy on sequences [n, window + 1], nats a byte; the statistics of training
        stay."""
        self.model.eval()
        self._track(False)
        batches = sequences.to(self.device).split(self.settings.sequences)
        losses = read(torch.stack([self._loss(batch) for batch in batches]))
        self._track(True)
        self.model.train()
        total = sum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True))
        return total / len(sequences)

    def _track(self, enabled: bool) -> None:
        for layer in self.model.attention_layers():
            layer.track_max_logits = enabled


def read(numbers: Tensor) -> list[float]:
    """The values of a vector: the one place where a step waits for its device."""
    return numbers.tolist()
