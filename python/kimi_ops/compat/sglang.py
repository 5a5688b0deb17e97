# SPDX-License-Identifier: MIT
"""SGLang's routers (`sglang.srt.layers.moe.topk`), the signatures since 0.5.8, and the functions
that it has from vLLM.

Weights are fp32, ids int32, best first; a padded token has ids -1, and weights 0. The scaling
factor is applied where theirs is: to renormalised weights, and only if the call asks for it. What
earlier releases took in between, `num_token_non_padded` and `expert_location_dispatch_info`, is
taken by name.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.compat._arguments import only
from kimi_ops.compat.vllm import fused_experts, moe_align_block_size
from kimi_ops.moe.topk_gate import topk_gate

__all__ = [
    "biased_grouped_topk",
    "fused_experts",
    "fused_topk",
    "grouped_topk",
    "moe_align_block_size",
]


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: Tensor | None = None,
    scoring_func: Literal["softmax", "sigmoid"] = "softmax",
    *,
    num_token_non_padded: Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them: `kimi_ops.topk_gate`.

    Parameters
    ----------
    hidden_states : Tensor [T, ...]
        Its T is compared.
    gating_output : Tensor [T, E], float32, bfloat16 or float16
    topk : int
    renormalize : bool
    correction_bias : Tensor [E], optional
        Selects, never weighs. With sigmoid: their kernel for softmax reads none.
    scoring_func : {"softmax", "sigmoid"}
    num_token_non_padded : scalar Tensor, optional
        Tokens from this one on are padding. Not read on the host.
    expert_location_dispatch_info
        Not served: `kimi_ops.replica_ids` turns ids into places.

    Returns
    -------
    Tensor [T, topk] float32, Tensor [T, topk] int32

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.sglang import fused_topk
    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    >>> fused_topk(torch.ones(2, 8), logits, 2, True, num_token_non_padded=torch.tensor(1))[1]
    tensor([[ 1,  2],
            [-1, -1]], dtype=torch.int32)
    """
    op, bias = "fused_topk", correction_bias
    _check.choice(op, "scoring_func", scoring_func, ("softmax", "sigmoid"))
    if bias is not None:
        _check.tensor(op, "correction_bias", bias)
        only(op, "scoring_func", scoring_func, "sigmoid", "a bias goes with it")
        bias = bias.detach().float()
    return _gate(
        op, hidden_states, gating_output, topk, renormalize, num_token_non_padded,
        expert_location_dispatch_info, score_function=scoring_func, expert_bias=bias,
    )  # fmt: skip


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float | None = None,
    apply_routed_scaling_factor_on_output: bool = False,
    *,
    num_token_non_padded: Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the best of the groups with the best expert.

    Parameters
    ----------
    num_expert_group, topk_group : int
        Both are needed.
    num_fused_shared_experts
        Not served: run the shared expert beside `fused_experts`.
    routed_scaling_factor : float, optional
        Applied with `renormalize` and `apply_routed_scaling_factor_on_output`.
    hidden_states, gating_output, topk, renormalize, num_token_non_padded, \
expert_location_dispatch_info
        As in `fused_topk`.

    Returns
    -------
    Tensor [T, topk] float32, Tensor [T, topk] int32
    """
    return _gate(
        "grouped_topk", hidden_states, gating_output, topk, renormalize, num_token_non_padded,
        expert_location_dispatch_info, score_function="softmax", group_score_topk=1,
        **_groups("grouped_topk", num_expert_group, topk_group, num_fused_shared_experts),
        scaling_factor=_factor(
            renormalize and apply_routed_scaling_factor_on_output, routed_scaling_factor
        ),
    )  # fmt: skip


def biased_grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    correction_bias: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float | None = None,
    apply_routed_scaling_factor_on_output: bool = False,
    *,
    num_token_non_padded: Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores, chosen with a bias; a group scores the sum of its two best.

    Parameters
    ----------
    correction_bias : Tensor [E]
        Selects, never weighs.
    hidden_states, gating_output, topk, renormalize, num_expert_group, topk_group, \
num_fused_shared_experts, routed_scaling_factor, num_token_non_padded, \
expert_location_dispatch_info, apply_routed_scaling_factor_on_output
        As in `grouped_topk`.

    Returns
    -------
    Tensor [T, topk] float32, Tensor [T, topk] int32
    """
    op = "biased_grouped_topk"
    _check.tensor(op, "correction_bias", correction_bias)
    return _gate(
        op, hidden_states, gating_output, topk, renormalize, num_token_non_padded,
        expert_location_dispatch_info, score_function="sigmoid", group_score_topk=2,
        expert_bias=correction_bias.detach().float(),
        **_groups(op, num_expert_group, topk_group, num_fused_shared_experts),
        scaling_factor=_factor(
            renormalize and apply_routed_scaling_factor_on_output, routed_scaling_factor
        ),
    )  # fmt: skip


def _gate(
    op: str,
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    count: Tensor | None,
    places: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    only(op, "expert_location_dispatch_info", places, None, "use kimi_ops.replica_ids")
    _check.tensor(op, "hidden_states", hidden_states)
    _check.tensor(op, "gating_output", gating_output)
    _check.shape(op, "gating_output", gating_output, (len(hidden_states), "E"))
    valid = None
    if count is not None:
        _check.tensor(op, "num_token_non_padded", count)
        _check.shape(op, "num_token_non_padded", count, (), "the number of tokens that count")
        valid = torch.arange(len(gating_output), device=gating_output.device) < count
    gate = topk_gate(gating_output, topk, renormalize=renormalize, valid=valid, **options)
    return gate.weights, gate.indices


def _groups(op: str, groups: int | None, kept: int | None, shared: int) -> dict[str, int]:
    only(op, "num_fused_shared_experts", shared, 0, "run the shared expert beside the others")
    if groups is None or kept is None:
        raise ValueError(f"{op}: num_expert_group: expected both numbers of groups, got None")
    return dict(num_groups=groups, topk_groups=kept)


def _factor(asked: bool, factor: float | None) -> float:
    return factor if asked and factor is not None else 1.0
