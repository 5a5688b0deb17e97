# SPDX-License-Identifier: MIT
"""The mixture-of-experts layer: router, routed experts, shared experts."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kimi_ops import PermutePlan, TopkGate
from kimi_ops.choices import ScoreFunction
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.layers import MLP, RMSNorm
from kimi_ops.models.kimi_k2.recompute import Recomputes, fp8_storage
from kimi_ops.nn import Experts, Router
from kimi_ops.nn import MoE as Layer
from kimi_ops.nn.moe import Losses, mask_of
from kimi_ops.parallel.results import Pending


class Rest(NamedTuple):
    """What is there of a layer's result but the routed experts' sum."""

    shared: Tensor | None  # [T, H]
    losses: Losses
    shape: torch.Size


class Leaving(NamedTuple):
    """Tokens on their way to their experts, or here where one process has all."""

    tokens: Any  # [T, H], or what `ExpertRanks.leave` gives
    gate: TopkGate
    plan: PermutePlan | None
    rest: Rest


class Returning(NamedTuple):
    """The routed experts' sum [T, H], on its way home likewise."""

    routed: Tensor | Pending[Tensor]
    rest: Rest


def _router(config: KimiK2Config, **factory: Any) -> Router:
    """Expert scores in fp32; the bias takes part in the selection only and has no gradient."""
    everyone = config.num_experts_per_tok == config.n_routed_experts
    return Router(
        config.hidden_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        score_function=cast(ScoreFunction, config.scoring_func),  # checked there
        num_groups=1 if everyone else config.n_group,
        topk_groups=1 if everyone else config.topk_group,
        renormalize=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
        **factory,
    )


class MoE(Recomputes, Layer):
    """`kimi_ops.nn.MoE` of a configuration, in parts between which tokens travel to other ranks.

    Attributes
    ----------
    ranks : ExpertRanks or None
        Who has the routed experts; None: this process has all.
    """

    def __init__(
        self, config: KimiK2Config, ranks: ExpertRanks | None = None, **factory: Any
    ) -> None:
        if ranks is not None and ranks.count != config.n_routed_experts:
            raise ValueError(
                f"KimiK2: expert_ranks: expected ranks of {config.n_routed_experts} experts, got "
                f"ranks of {ranks.count}; make them from this config"
            )
        here = config.n_routed_experts if ranks is None else len(ranks.experts)
        hidden, width = config.hidden_size, config.moe_intermediate_size
        shared = None
        if config.n_shared_experts:
            shared = MLP(config, width * config.n_shared_experts, **factory)
        super().__init__(
            _router(config, **factory),
            Experts(here, hidden, width, activation=config.hidden_act, **factory),
            shared,
            balance_coefficient=config.aux_loss_alpha,
            per_sequence=config.seq_aux,
        )
        self.config, self.ranks = config, ranks

    def _check_sizes(self, count: int, hidden: int) -> None:
        """All are of one configuration; here may be the experts of a rank alone."""

    def forward(
        self, x: Tensor, valid: Tensor | None = None, norm: RMSNorm | None = None
    ) -> Tensor:
        """[B, S, H] from x [B, S, H], or from norm(x); tokens that are not `valid` [B, S] get no
        routed expert."""
        return self.arrive(self.compute(self.leave(x, valid, norm)))

    def leave(self, x: Tensor, valid: Tensor | None = None, norm: RMSNorm | None = None) -> Leaving:
        """The first part of `forward`, up to where tokens are on their way to other ranks.

        `compute` is the second, up to where results are on their way home, `arrive` the third.
        Another batch may do its parts in between.
        """
        mask = mask_of(x, valid)
        tokens, logits, gate, plan, shared = self.again(self._entered, x, mask, norm)
        losses = self.losses(logits, gate.indices, x.shape[0], mask)
        self.count(gate)
        leaving = tokens if self.ranks is None else self.ranks.leave(tokens, gate)
        return Leaving(leaving, gate, plan, Rest(shared, losses, x.shape))

    def compute(self, leaving: Leaving) -> Returning:
        """The weighted sum of the routed experts of this process."""
        tokens, gate, plan, rest = leaving
        if self.ranks is None:
            with self._stored():
                return Returning(self.experts(tokens, gate, plan), rest)
        matrices = self.experts.gate_up_proj, self.experts.down_proj
        sums = self.ranks.compute(tokens, *matrices, self.experts.activation, self._stored())
        return Returning(sums, rest)

    def arrive(self, returning: Returning) -> Tensor:
        """What `forward` gives."""
        routed, (shared, losses, shape) = returning
        self.keep(losses)
        y = routed if isinstance(routed, Tensor) else routed.wait()
        return (y if shared is None else y + shared).view(shape)

    def _entered(
        self, x: Tensor, mask: Tensor | None, norm: RMSNorm | None
    ) -> tuple[Tensor, Tensor, TopkGate, PermutePlan | None, Tensor | None]:
        """The tokens [T, H], their logits, experts and rows, and what the shared experts give."""
        tokens = (x if norm is None else norm(x)).flatten(0, 1)
        # Ranks that share the experts make plans of the rows that they get.
        logits, gate, plan = self.gate(tokens, mask, planned=self.ranks is None)
        shared = None if self.shared_experts is None else self.shared_experts(tokens)
        return tokens, logits, gate, plan, shared

    def _stored(self) -> AbstractContextManager[Any]:
        """How the inputs of the experts' products and of SwiGLU are kept."""
        if not self.fp8_activations or not torch.is_grad_enabled():
            return nullcontext()
        return fp8_storage(self.config.hidden_size, 2 * self.config.moe_intermediate_size)
