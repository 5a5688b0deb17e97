# SPDX-License-Identifier: MIT
"""What a step showed: measured by each rank on its own part of the model, read once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.decoder import Decoder
from kimi_ops.reference.qk_clip import clip_factor
from kimi_ops.train.ranks import Ranks


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


class Census:
    """The numbers of the whole model, of which each stage has those of its layers.

    Parameters
    ----------
    model : KimiK2 or Stage
        What this rank has.
    ranks : Ranks
    """

    def __init__(self, model: Decoder, ranks: Ranks) -> None:
        self._model, self._ranks, config = model, ranks, model.config
        self._names = list(model.shapes())
        first, every = next(model.decoder_layers()).layer, range(config.num_hidden_layers)
        sparse = [layer for layer in every if config.is_moe_layer(layer)]
        # where those of this rank begin among all, and how many all are
        self._layers = first, len(every)
        self._moe = sum(layer < first for layer in sparse), len(sparse)
        own = next(name for name, _ in model.named_parameters())
        self._parameters = self._names.index(own), len(self._names)

    @torch.no_grad()
    def take(self, loss: Tensor, auxiliary: Tensor, tau: float) -> Tensor:
        """All numbers of a step in one tensor, for `told`; the loads of all ranks are left in the
        layers. `loss` and `auxiliary` are this stage's parts of sums."""
        model, dp = self._model, self._ranks.layout.dp
        logits = torch.stack([layer.max_logits for layer in model.attention_layers()])
        moes = model.moe_layers()
        experts = model.config.n_routed_experts
        counts = torch.zeros(0, experts, dtype=torch.int32, device=logits.device)
        if moes:  # the first layers may be dense, and a stage of their own
            counts = torch.stack([moe.tokens_per_expert for moe in moes])
        norms = dict.fromkeys(model.parameters(), logits.new_zeros(()))
        grads = {param: param.grad for param in norms if param.grad is not None}
        norms |= dict(zip(grads, torch._foreach_norm(list(grads.values())), strict=True))
        parts = (
            torch.stack((loss, auxiliary)),
            _placed(logits, *self._layers, -torch.inf),
            _placed(counts, *self._moe, 0),
            _placed(torch.stack(list(norms.values())), *self._parameters, 0),
        )
        sizes = [part.numel() for part in parts]
        # fp64: it holds every count
        own = torch.cat([part.double().flatten() for part in parts])
        sums, maxima, loads, lengths = self._ranks.gather(own).split(sizes, dim=1)
        counts = loads.sum(0).view_as(parts[2]).to(counts.dtype)
        start = self._moe[0]
        for moe, count in zip(moes, counts[start : start + len(moes)], strict=True):
            moe.tokens_per_expert.copy_(count)
        largest = maxima.amax(0).to(logits.dtype)
        clipped = (clip_factor(largest, tau) < 1).sum()
        worst = counts.amax(dim=1) / counts.float().mean(dim=1)
        logit = torch.stack((largest.max(), clipped))
        facts = (sums.sum(0) / dp, logit, worst, lengths.amax(0))
        return torch.cat([fact.double() for fact in facts])

    def told(self, numbers: list[float], lr: float) -> tuple[StepStatistics, str | None]:
        """What `take` gave, by name; what of it is not finite."""
        (total, balance, most, heads), rest = numbers[:4], numbers[4:]
        layers, lengths = rest[: self._moe[1]], rest[self._moe[1] :]
        wrong = None if math.isfinite(total) else f"the loss {total}"
        for name, length in zip(self._names, lengths, strict=True):
            if wrong is None and not math.isfinite(length):
                wrong = f"a gradient of norm {length} at {name}"
        statistics = StepStatistics(
            loss=total,
            auxiliary=balance,
            lr=lr,
            max_logit=most,
            clipped_heads=int(heads),
            load_max_over_mean=max(layers),
            load_layers=layers,
        )
        return statistics, wrong


def _placed(own: Tensor, start: int, total: int, rest: float) -> Tensor:
    """This rank's numbers among those of all stages, `rest` in the place of others."""
    if len(own) == total:
        return own
    whole = own.new_full((total, *own.shape[1:]), rest)
    whole[start : start + len(own)] = own
    return whole
