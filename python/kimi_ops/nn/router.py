# SPDX-License-Identifier: MIT
"""The router of a mixture of experts: scores, choice, and the plan of the experts' rows."""

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_ops._autocast import no_autocast
from kimi_ops.choices import ScoreFunction
from kimi_ops.moe.topk_gate import TopkGate, gate_plan, topk_gate
from kimi_ops.nn.stored import FixedBuffers
from kimi_ops.reference import topk_gate as reference
from kimi_ops.routing import PermutePlan

__all__ = ["Router"]


class Router(FixedBuffers):
    """Scores of the experts in fp32, whatever the dtype of the parameters, and the choice of k.

    Parameters
    ----------
    hidden_size, num_experts, top_k : int
        H, E and K.
    bias : bool
        A trained bias of the logits.
    expert_bias : bool
        A bias of the selection alone, without gradient, in fp32 whatever the module is cast to;
        `MoE.update_bias_` moves it.
    score_function, num_groups, topk_groups, group_score_topk, renormalize, scaling_factor
        As `kimi_ops.topk_gate` takes them.
    device, dtype : optional
        Of the parameters.

    Attributes
    ----------
    weight : Parameter [E, H]
    bias : Parameter [E] or None
    e_score_correction_bias : Tensor [E] float32 or None

    Raises
    ------
    TypeError, ValueError
        Of the first forward, as `kimi_ops.topk_gate`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.nn import Router
    >>> logits, gate, plan = Router(8, 16, 2, score_function="softmax")(torch.randn(5, 8))
    >>> logits.shape, gate.indices.shape, plan
    (torch.Size([5, 16]), torch.Size([5, 2]), None)
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    e_score_correction_bias: Tensor  # None without expert_bias

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        expert_bias: bool = True,
        score_function: ScoreFunction = "sigmoid",
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score_topk: int = 2,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.options: dict[str, Any] = {
            "score_function": score_function,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "group_score_topk": group_score_topk,
            "renormalize": renormalize,
            "scaling_factor": scaling_factor,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(num_experts, **factory)) if bias else None
        correction = torch.empty(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("e_score_correction_bias", correction if expert_bias else None)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, top_k: int, **options: Any) -> Self:
        """The router whose logits are those of a `torch.nn.Linear`; shares its parameters.

        Parameters
        ----------
        linear : nn.Linear
            H to E.
        top_k : int
        **options
            As the class takes them, but for `bias`.
        """
        experts, hidden = linear.weight.shape
        router = cls(hidden, experts, top_k, bias=linear.bias is not None, device="meta", **options)
        router.weight, router.bias = cast(nn.Parameter, linear.weight), linear.bias
        if router.e_score_correction_bias is not None:
            device = linear.weight.device
            router.e_score_correction_bias = torch.zeros(
                experts, dtype=torch.float32, device=device
            )
        return router

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as `torch.nn.Linear` does; the bias of the selection becomes 0."""
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()
        if self.weight.is_meta:
            return
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters(recurse=False):
            parameter.uniform_(-bound, bound)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, planned: bool = False
    ) -> tuple[Tensor, TopkGate, PermutePlan | None]:
        """Logits [T, E] fp32 and the choice of experts, for x [T, H]; none where not `valid` [T].

        `planned`: with the plan of the experts' rows, from the same call. In float64, for
        `gradcheck`, all of it is plain torch.
        """
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        with no_autocast(x.device.type):  # it would round the scores to 16 bits
            bias = None if self.bias is None else self.bias.to(wide)
            logits = F.linear(x.to(wide), self.weight.to(wide), bias)
        options = {**self.options, "expert_bias": self.e_score_correction_bias, "valid": valid}
        if wide == torch.float64:
            gate, plan = reference.gate_plan(logits, self.top_k, **options)
            return logits, TopkGate._make(gate), plan if planned else None
        if planned:
            return logits, *gate_plan(logits, self.top_k, **options)
        return logits, topk_gate(logits, self.top_k, **options), None

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{hidden}, {experts}, {self.top_k}, {options}"
