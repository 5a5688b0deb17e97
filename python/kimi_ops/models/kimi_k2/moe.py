# SPDX-License-Identifier: MIT
"""The mixture-of-experts layer: router, routed experts, shared experts."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_ops import (
    PermutePlan,
    TopkGate,
    fused_experts,
    gate_plan,
    sequence_balance_loss,
    topk_gate,
)
from kimi_ops._autocast import no_autocast
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.layers import MLP, FixedBuffers, RMSNorm
from kimi_ops.models.kimi_k2.quantized_experts import QuantizedExperts
from kimi_ops.models.kimi_k2.recompute import Recomputes, fp8_storage
from kimi_ops.operators.count_once import count_once_, recomputing
from kimi_ops.parallel.results import Pending


class Rest(NamedTuple):
    """What is there of a layer's result but the routed experts' sum."""

    shared: Tensor | None  # [T, H]
    balance_loss: Tensor | None
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


class Router(FixedBuffers):
    """Expert scores in fp32; the bias takes part in the selection only and has no gradient."""

    e_score_correction_bias: Tensor

    def __init__(self, config: KimiK2Config, **factory: Any) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, **factory))
        bias = torch.zeros(experts, dtype=torch.float32, device=factory.get("device"))
        self.register_buffer("e_score_correction_bias", bias)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, planned: bool = False
    ) -> tuple[Tensor, TopkGate, PermutePlan | None]:
        """logits [T, E] fp32 and the choice of experts, for x [T, H]; none where not `valid`.

        `planned`: with the plan of the experts' rows, from the same call.
        """
        config = self.config
        with no_autocast(x.device.type):  # it would round the scores to 16 bits
            logits = F.linear(x.float(), self.weight.float())
        everyone = config.num_experts_per_tok == config.n_routed_experts
        options: dict[str, Any] = {
            "score_function": config.scoring_func,
            "expert_bias": self.e_score_correction_bias,
            "num_groups": 1 if everyone else config.n_group,
            "topk_groups": 1 if everyone else config.topk_group,
            "renormalize": config.norm_topk_prob,
            "scaling_factor": config.routed_scaling_factor,
            "valid": valid,
        }
        if planned:
            return logits, *gate_plan(logits, config.num_experts_per_tok, **options)
        return logits, topk_gate(logits, config.num_experts_per_tok, **options), None


class Experts(nn.Module):
    """The matrices of the routed experts of this process, stacked; gate rows before up rows."""

    def __init__(self, config: KimiK2Config, experts: int, **factory: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden, **factory))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width, **factory))


class MoE(Recomputes):
    """Routed experts plus shared experts; counts its loads in training.

    Attributes
    ----------
    ranks : ExpertRanks or None
        Who has the routed experts; None: this process has all.
    tokens_per_expert : Tensor [E] int32
        Tokens of this process sent to each expert by the training forwards since
        `reset_statistics`.
    balance_loss : Tensor or None
        Sequence-wise balance loss of the last training forward, None where `aux_loss_alpha` is 0,
        after `reset_statistics` and in copies.
    """

    tokens_per_expert: Tensor

    def __init__(
        self, config: KimiK2Config, ranks: ExpertRanks | None = None, **factory: Any
    ) -> None:
        super().__init__()
        if ranks is not None and ranks.count != config.n_routed_experts:
            raise ValueError(
                f"KimiK2: expert_ranks: expected ranks of {config.n_routed_experts} experts, got "
                f"ranks of {ranks.count}; make them from this config"
            )
        self.config, self.ranks = config, ranks
        self.gate = Router(config, **factory)
        here = config.n_routed_experts if ranks is None else len(ranks.experts)
        self.experts: Experts | QuantizedExperts = Experts(config, here, **factory)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = MLP(config, width, **factory)
        loads = torch.zeros(
            config.n_routed_experts, dtype=torch.int32, device=factory.get("device")
        )
        self.register_buffer("tokens_per_expert", loads, persistent=False)
        self.balance_loss: Tensor | None = None

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
        tokens, logits, gate, plan, shared = self.again(self._entered, x, valid, norm)
        balance_loss = None
        if self.training and self.config.aux_loss_alpha:
            balance_loss = self._balance(logits, gate.indices, x.shape[0], valid)
        if torch.compiler.is_compiling():
            if self.training:
                count_once_(self.tokens_per_expert, gate.tokens_per_expert)
        elif self.training and not recomputing():  # a repeated forward counts once
            self.tokens_per_expert += gate.tokens_per_expert
        leaving = tokens if self.ranks is None else self.ranks.leave(tokens, gate)
        return Leaving(leaving, gate, plan, Rest(shared, balance_loss, x.shape))

    def compute(self, leaving: Leaving) -> Returning:
        """The weighted sum of the routed experts of this process."""
        tokens, gate, plan, rest = leaving
        matrices = self.experts.gate_up_proj, self.experts.down_proj
        activation = self.config.hidden_act
        if self.ranks is not None:
            sums = self.ranks.compute(tokens, *matrices, activation, self._stored())
            return Returning(sums, rest)
        with self._stored():
            y = fused_experts(
                tokens, *matrices, gate.weights, gate.indices, activation=activation, plan=plan
            )
        return Returning(y, rest)

    def arrive(self, returning: Returning) -> Tensor:
        """What `forward` gives."""
        routed, (shared, balance_loss, shape) = returning
        # a repeated forward must make the same graph, but is not the last one
        if torch.compiler.is_compiling() or not recomputing():
            self.balance_loss = balance_loss
        y = routed if isinstance(routed, Tensor) else routed.wait()
        return (y if shared is None else y + shared).view(shape)

    def _entered(
        self, x: Tensor, valid: Tensor | None, norm: RMSNorm | None
    ) -> tuple[Tensor, Tensor, TopkGate, PermutePlan | None, Tensor | None]:
        """The tokens [T, H], their logits, experts and rows, and what the shared experts give."""
        tokens = (x if norm is None else norm(x)).flatten(0, 1)
        valid_tokens = None if valid is None else valid.flatten()
        # Ranks that share the experts make plans of the rows that they get.
        logits, gate, plan = self.gate(tokens, valid_tokens, planned=self.ranks is None)
        shared = None if self.shared_experts is None else self.shared_experts(tokens)
        return tokens, logits, gate, plan, shared

    def _balance(self, logits: Tensor, indices: Tensor, batch: int, valid: Tensor | None) -> Tensor:
        """The sequence balance loss; of sequences with padding, over their tokens alone."""
        return sequence_balance_loss(
            logits, indices, num_sequences=batch if self.config.seq_aux else 1,
            valid=None if valid is None else valid.flatten(),
            score_function=self.config.scoring_func, coefficient=self.config.aux_loss_alpha,
        )  # fmt: skip

    def _stored(self) -> AbstractContextManager[Any]:
        """How the inputs of the experts' products and of SwiGLU are kept."""
        if not self.fp8_activations or not torch.is_grad_enabled():
            return nullcontext()
        return fp8_storage(self.config.hidden_size, 2 * self.config.moe_intermediate_size)

    def reset_statistics(self) -> None:
        """Forget the loads and the balance loss, which holds the graph of its forward."""
        self.tokens_per_expert.zero_()
        self.balance_loss = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the balance loss belongs to a graph and stays behind."""
        return {**self.__dict__, "balance_loss": None}
