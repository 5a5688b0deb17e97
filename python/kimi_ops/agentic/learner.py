# SPDX-License-Identifier: MIT
"""A model and its MuonClip, for losses on chosen tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kimi_ops import MuonClip, QKClip, muon_param_groups, update_expert_bias_
from kimi_ops.models.kimi_k2 import KimiK2

__all__ = ["Learner", "token_losses"]


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy [B, S] of logits [B, S, V] on the ids [B, S + 1] behind the first."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


class Learner:
    """
    Parameters
    ----------
    model : KimiK2
    lr : float
        Peak learning rate.
    tau : float
        Largest attention logit that QK-Clip allows.
    bias_rate : float
        Step of the expert bias; 0 leaves routes as they are.
    clip_norm : float
        Largest gradient norm of the AdamW groups.
    """

    def __init__(
        self,
        model: KimiK2,
        lr: float,
        *,
        tau: float = 100.0,
        bias_rate: float = 0.01,
        clip_norm: float = 1.0,
    ) -> None:
        self.model, self.lr, self.bias_rate = model.train(), lr, bias_rate
        clip = QKClip(model.attention_layers(), tau=tau)
        self.optimizer = MuonClip(muon_param_groups(model), lr=lr, qk_clip=clip)
        for group in self.optimizer.param_groups:
            if group["algorithm"] == "adamw":
                group["max_grad_norm"] = clip_norm

    def step(self, loss: Callable[[], Tensor], factor: float) -> float:
        """One update by the gradient of `loss()` and of its last forward's balance loss; the loss.

        Parameters
        ----------
        loss : callable
            Runs the model.
        factor : float
            Of the peak learning rate.

        Raises
        ------
        FloatingPointError
            The loss is not finite; nothing was updated.
        """
        total = loss()
        value = float(total.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"agentic: expected a finite loss, got {value}; lower the learning rate "
                f"(lr {self.lr})"
            )
        (total + self.model.auxiliary_loss()).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.bias_rate:
            for moe in self.model.moe_layers():
                bias = moe.gate.e_score_correction_bias
                update_expert_bias_(bias, moe.tokens_per_expert, self.bias_rate)
        self.model.reset_statistics()
        return value
