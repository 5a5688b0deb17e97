# SPDX-License-Identifier: MIT
"""One training step of a Kimi K2 model, and its validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import QKClip, update_expert_bias_
from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2, backward_two, forward_two
from kimi_ops.models.kimi_k2.recompute import set_storage
from kimi_ops.reference.qk_clip import clip_factor
from kimi_ops.train.optimizer import optimizer_of
from kimi_ops.train.ranks import Ranks, check_batch
from kimi_ops.train.schedule import warmup_stable_decay
from kimi_ops.train.settings import TrainSettings


@dataclass(frozen=True)
class StepStatistics:
    """What one step showed, of all ranks together.

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

    Forward and backward of every micro-batch; MuonClip, which clips the AdamW gradients, with
    QK-Clip; expert biases; reset. Ranks share each micro-batch, and all of them call every method;
    with `Ranks.overlap` micro-batches are computed in twos.

    Parameters
    ----------
    settings : TrainSettings
    model : KimiK2, optional
        By default one with the weights of the settings' seed, spread over `ranks`.
    device : torch.device or str
        Of that model.
    ranks : Ranks, optional
        By default this process alone.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: KimiK2 | None = None,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.settings, self.ranks = settings, Ranks() if ranks is None else ranks
        check_batch(settings.sequences, settings.accumulate, settings.recompute, self.ranks)
        if model is None:
            config = settings.model_config()
            spread = spread_experts(settings, self.ranks, device)
            dtype = getattr(torch, settings.weights)
            model = KimiK2(config, device=device, dtype=dtype, expert_ranks=spread)
            model.init_weights(settings.seed)
        self.model = model.train()
        set_storage(model, settings.recompute, settings.fp8_activations)
        self.device = model.lm_head.weight.device
        self.qk_clip = QKClip(self.model.attention_layers(), tau=settings.tau)
        self.optimizer = optimizer_of(self.model, self.ranks, settings.lr, self.qk_clip)
        self.apply_settings()
        self._warmup = round(settings.steps * settings.warmup)
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        for _, parameter in self._named:
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
        micro_batches = share.split(settings.sequences // self.ranks.world)
        total, auxiliary = torch.zeros(2, device=self.device).unbind()
        at_once = 2 if self.ranks.overlap else 1
        for n in range(0, len(micro_batches), at_once):
            for loss, balance in self._backward(micro_batches[n : n + at_once], len(micro_batches)):
                total += loss
                auxiliary += balance
        gradients = {n: p.grad for n, p in self._named if p.grad is not None}
        norms = dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
        statistics = self._statistics(step, total, auxiliary, norms)
        factor = self.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        self.optimizer.step()
        for moe in self.model.moe_layers():
            bias = moe.gate.e_score_correction_bias
            update_expert_bias_(bias, moe.tokens_per_expert, self.bias_rate(step))
        self._forget()
        return statistics

    def _backward(self, batches: Sequence[Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
        """Forward and backward of one micro-batch of `count`, or of two side by side; the loss and
        the balance loss of each, as shares of the step's."""
        if len(batches) == 1:
            found = [(self._losses(batches[0]), self.model.auxiliary_loss())]
        else:
            with self._compute():
                first, second = forward_two(self.model, batches[0][:, :-1], batches[1][:, :-1])
            found = [
                (window_losses(output.logits, batch), output.auxiliary_loss)
                for output, batch in ((first, batches[0]), (second, batches[1]))
            ]
        shares = [(losses.mean() / count, balance / count) for losses, balance in found]
        sums = [loss + balance for loss, balance in shares]
        sums[0].backward() if len(sums) == 1 else backward_two(self.model, sums)
        return [(loss.detach(), balance.detach()) for loss, balance in shares]

    def _losses(self, batch: Tensor) -> Tensor:
        """The mean cross entropy of each window [B]."""
        with self._compute():
            logits = self.model(batch[:, :-1])
        return window_losses(logits, batch)

    def _compute(self) -> AbstractContextManager[object]:
        """Products in the settings' dtype, where it is not that of the weights."""
        if self.settings.dtype == self.settings.weights:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.dtype))

    @torch.no_grad()
    def _statistics(
        self, step: int, loss: Tensor, auxiliary: Tensor, norms: dict[str, Tensor]
    ) -> StepStatistics:
        """All numbers of a step in one tensor, read once, before anything is updated; the loads of
        all ranks are left in the layers.

        Raises
        ------
        Diverged
            The loss or a gradient's norm is not finite.
        """
        logits = torch.stack([layer.max_logits for layer in self.model.attention_layers()])
        counts = torch.stack([moe.tokens_per_expert for moe in self.model.moe_layers()])
        parts = (torch.stack((loss, auxiliary)), logits, counts, torch.stack(list(norms.values())))
        sizes = [part.numel() for part in parts]
        # fp64: it holds every count
        own = torch.cat([part.double().flatten() for part in parts])
        means, maxima, loads, lengths = self.ranks.gather(own).split(sizes, dim=1)
        counts.copy_(loads.sum(0).view_as(counts))
        for moe, count in zip(self.model.moe_layers(), counts, strict=True):
            moe.tokens_per_expert.copy_(count)
        largest = maxima.amax(0).to(logits.dtype)
        clipped = (clip_factor(largest, self.settings.tau) < 1).sum()
        worst = counts.amax(dim=1) / counts.float().mean(dim=1)
        facts = (means.mean(0), torch.stack((largest.max(), clipped)), worst, lengths.amax(0))
        numbers = read(torch.cat([fact.double() for fact in facts]))
        (total, balance, most, heads), rest = numbers[:4], numbers[4:]
        layers, longest = rest[: len(counts)], rest[len(counts) :]
        wrong = [f"the loss {total}"] if not math.isfinite(total) else []
        for name, length in zip(norms, longest, strict=True):
            if not math.isfinite(length):
                wrong.append(f"a gradient of norm {length} at {name}")
        if wrong:
            self._forget()
            raise Diverged(step + 1, wrong[0], self.settings.lr)
        return StepStatistics(
            loss=total,
            auxiliary=balance,
            lr=self.settings.lr * self.factor(step),
            max_logit=most,
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
        losses = torch.cat([self._shared_losses(batch) for batch in batches])
        self._track(True)
        self.model.train()
        return read(self.ranks.gather(losses).sum(0).mean(0, keepdim=True))[0]

    def _shared_losses(self, batch: Tensor) -> Tensor:
        """The losses [B] of this rank's windows in fp64, 0 for those of other ranks."""
        rows, own = self.ranks.turns(len(batch), batch.device)
        losses = torch.zeros(len(batch), dtype=torch.float64, device=batch.device)
        losses[rows[:own]] = self._losses(batch[rows])[:own].double()
        return losses

    def _track(self, enabled: bool) -> None:
        for layer in self.model.attention_layers():
            layer.track_max_logits = enabled


def window_losses(logits: Tensor, batch: Tensor) -> Tensor:
    """The mean cross entropy [B] of logits [B, S, V] on the next tokens of windows [B, S + 1]."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).mean(1)


def spread_experts(
    settings: TrainSettings, ranks: Ranks, device: torch.device | str
) -> ExpertRanks | None:
    """The way to the experts of a run's model, wide enough for its micro-batches."""
    tokens = settings.sequences // ranks.world * settings.window
    return ranks.spread(settings.model_config(), tokens, torch.device(device))


def read(numbers: Tensor) -> list[float]:
    """The values of a vector: the one place where a step waits for its device."""
    return numbers.tolist()
