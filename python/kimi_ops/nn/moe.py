# SPDX-License-Identifier: MIT
"""The mixture-of-experts layer: router, routed experts, shared experts, balance."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_ops import _check
from kimi_ops.moe.balance import sequence_balance_loss, update_expert_bias_, z_loss
from kimi_ops.moe.topk_gate import TopkGate
from kimi_ops.nn.checks import Activated
from kimi_ops.nn.experts import Experts, RoutedExperts
from kimi_ops.nn.latent import Latent
from kimi_ops.nn.router import Router
from kimi_ops.operators.count_once import count_once_, recomputing, seen_by_a_graph
from kimi_ops.routing import PermutePlan

__all__ = ["Losses", "MoE"]


def mask_of(x: Tensor, valid: Tensor | None) -> Tensor | None:
    """`valid` of x [..., H] beside its tokens, [T]."""
    if valid is None:
        return None
    _check.tensor("MoE", "valid", valid)
    _check.shape("MoE", "valid", valid, x.shape[:-1], "one for each token of x")
    return valid.flatten()


class Losses(NamedTuple):
    """Of one training forward, where they are asked for."""

    balance: Tensor | None
    z: Tensor | None


class MoE(nn.Module):
    r"""Tokens through the experts that a router chooses, and through shared ones.

    .. math:: y_t = \sum_{e \in I_t} w_{te}\, \text{expert}_e(x_t) + \text{shared}(x_t)

    Parameters
    ----------
    gate : Router
    experts : Experts or StoredExperts
    shared_experts : Module, optional
        Any [T, H] -> [T, H] that every token goes through, `MLP` for example.
    latent : Latent, optional
        Where the routed experts are narrower than the model: their hidden size is its.
    balance_coefficient : float
        Of `kimi_ops.sequence_balance_loss`; 0 leaves it out.
    z_coefficient : float
        Of `kimi_ops.z_loss`; 0 leaves it out.
    per_sequence : bool
        The balance loss is the mean of those of the sequences, not that of the batch.

    Attributes
    ----------
    tokens_per_expert : Tensor [E] int32
        Tokens sent to each expert by the training forwards since `reset_statistics`; a forward
        that activation checkpointing repeats counts once.
    balance_loss, z_loss : Tensor or None
        Of the last training forward, to be added to the model's loss; None where the coefficient is
        0, after `reset_statistics` and in copies.

    Raises
    ------
    ValueError
        Parts of different sizes.

    Notes
    -----
    State dict: ``gate.weight`` [E, H], ``gate.e_score_correction_bias`` [E],
    ``experts.gate_up_proj`` [E, 2F, H], ``experts.down_proj`` [E, H, F] and
    ``shared_experts.{gate,up,down}_proj.weight``: the names of transformers' DeepseekV3MoE; with a
    latent size ``latent.{down_proj,norm,up_proj}.weight``.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.nn import MLP, Experts, MoE, Router
    >>> gate = Router(8, 16, 2, scaling_factor=2.5)
    >>> moe = MoE(gate, Experts(16, 8, 4), MLP(8, 4), balance_coefficient=1e-4)
    >>> y = moe(torch.randn(2, 5, 8))
    >>> (y.square().mean() + moe.auxiliary_loss()).backward()
    >>> int(moe.tokens_per_expert.sum())
    20
    >>> _ = moe.update_bias_(1e-3)
    """

    tokens_per_expert: Tensor

    def __init__(
        self,
        gate: Router,
        experts: RoutedExperts,
        shared_experts: nn.Module | None = None,
        *,
        latent: Latent | None = None,
        balance_coefficient: float = 0.0,
        z_coefficient: float = 0.0,
        per_sequence: bool = True,
    ) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        self.latent = latent
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.per_sequence = per_sequence
        count, hidden = gate.weight.shape
        self._check_sizes(count, hidden)
        loads = torch.zeros(count, dtype=torch.int32, device=gate.weight.device)
        self.register_buffer("tokens_per_expert", loads, persistent=False)
        self.balance_loss: Tensor | None = None
        self.z_loss: Tensor | None = None

    def _check_sizes(self, count: int, hidden: int) -> None:
        whose = "the gate"
        if self.latent is not None:
            whose, (width, size) = "latent", self.latent.down_proj.weight.shape
            if size != hidden:
                raise ValueError(
                    f"MoE: latent: expected hidden size {hidden}, as of the gate, got {size}; make "
                    "both from the same sizes"
                )
            hidden = width
        came = tuple(self.experts.down_proj.shape[:2])
        if came != (count, hidden):
            raise ValueError(
                f"MoE: experts: expected {count} experts of hidden size {hidden}, as of {whose}, "
                f"got {came[0]} of {came[1]}; make both from the same sizes"
            )

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[nn.Module] | nn.ModuleList,
        gate: Router,
        shared_experts: nn.Module | None = None,
        *,
        names: Sequence[str] | None = None,
        activation: Activated | None = None,
        **options: Any,
    ) -> Self:
        """The layer of an `nn.ModuleList` of experts, whose weights are copied into stacks.

        Parameters
        ----------
        experts, names, activation
            As `Experts.from_experts` takes them.
        gate : Router
            `Router.from_linear` makes one of a linear layer.
        shared_experts : Module, optional
            Kept as it is.
        **options
            As the class takes them.

        Raises
        ------
        TypeError, ValueError
            As `Experts.from_experts`; parts of different sizes.

        Examples
        --------
        >>> from torch import nn
        >>> from kimi_ops.nn import MLP, MoE, Router
        >>> experts, linear = nn.ModuleList(MLP(8, 16) for _ in range(4)), nn.Linear(8, 4)
        >>> gate = Router.from_linear(linear, 2, score_function="softmax", expert_bias=False)
        >>> MoE.from_experts(experts, gate).experts
        Experts(4, 8, 16, activation=silu)
        """
        stacks = Experts.from_experts(experts, names=names, activation=activation)
        return cls(gate, stacks, shared_experts, **options)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[..., H] from x [..., H].

        Parameters
        ----------
        x : Tensor [B, S, H] or [T, H]
        valid : Tensor [B, S] or [T] bool, optional
            Tokens that are not get no routed expert, are not counted and are in no loss.
        """
        if x.dim() < 2:
            raise ValueError(
                f"MoE: x: expected [..., H] of tokens, got {list(x.shape)}; pass x[None]"
            )
        tokens, sequences = x.flatten(0, -2), x.shape[:-2].numel()
        mask = mask_of(x, valid)
        logits, gate, plan = self.gate(tokens, mask, planned=True)
        losses = self.losses(logits, gate.indices, sequences, mask)
        self.count(gate)
        y = self._routed(tokens, gate, plan)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        self.keep(losses)
        return y.view(x.shape)

    def _routed(self, tokens: Tensor, gate: TopkGate, plan: PermutePlan | None) -> Tensor:
        if self.latent is None:
            return self.experts(tokens, gate, plan)
        return self.latent(tokens, lambda x: self.experts(x, gate, plan))

    # ---- balance

    def losses(
        self, logits: Tensor, indices: Tensor, sequences: int, valid: Tensor | None
    ) -> Losses:
        """The balance loss and the z-loss of a training forward of so many sequences."""
        balance = z = None
        if self.training and self.balance_coefficient:
            balance = sequence_balance_loss(
                logits, indices, valid=valid,
                num_sequences=max(1, sequences) if self.per_sequence else 1,  # no batch: no tokens
                score_function=self.gate.options["score_function"],
                coefficient=self.balance_coefficient,
            )  # fmt: skip
        if self.training and self.z_coefficient:
            z = z_loss(logits, coefficient=self.z_coefficient, valid=valid)
        return Losses(balance, z)

    def count(self, gate: TopkGate) -> None:
        """Add the loads of a training forward."""
        if not self.training:
            return
        if seen_by_a_graph():
            count_once_(self.tokens_per_expert, gate.tokens_per_expert)
        elif not recomputing():  # a repeated forward counts once
            self.tokens_per_expert += gate.tokens_per_expert

    def keep(self, losses: Losses) -> None:
        """Let the losses of a forward be those of the last one."""
        # a repeated forward must make the same graph, but is not the last one
        if torch.compiler.is_compiling() or not recomputing():
            self.balance_loss, self.z_loss = losses

    def auxiliary_loss(self) -> Tensor:
        """Sum of the losses of the last training forward, 0-dim fp32; 0 where there are none."""
        losses = [loss for loss in (self.balance_loss, self.z_loss) if loss is not None]
        zero = torch.zeros((), dtype=torch.float32, device=self.gate.weight.device)
        return sum(losses, zero)

    @torch.no_grad()
    def update_bias_(
        self, rate: float, *, centered: bool = False, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Move the router's bias towards balance by the loads so far, then forget them.

        Parameters
        ----------
        rate, centered
            As `kimi_ops.update_expert_bias_` takes them.
        group : ProcessGroup, optional
            Its ranks add up their loads first, so that all have the same bias.

        Returns
        -------
        Tensor [E]
            The bias.

        Raises
        ------
        ValueError
            A router without such a bias.
        """
        bias = self.gate.e_score_correction_bias
        if bias is None:
            raise ValueError(
                "MoE.update_bias_: gate: expected a Router with a bias of the selection, got one "
                "without; make it with expert_bias=True"
            )
        loads = self.tokens_per_expert
        if group is not None:
            dist.all_reduce(loads, group=group)
        update_expert_bias_(bias, loads, rate, centered)
        self.reset_statistics()
        return bias

    def reset_statistics(self) -> None:
        """Forget the loads, and the losses, which hold the graph of their forward."""
        self.tokens_per_expert.zero_()
        self.balance_loss = self.z_loss = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: losses belong to a graph and stay behind."""
        return {**self.__dict__, "balance_loss": None, "z_loss": None}
