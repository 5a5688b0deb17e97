# SPDX-License-Identifier: MIT
"""The router that TransformerEngine and Megatron share, over `topk_gate`."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.compat._arguments import only
from kimi_ops.moe.topk_gate import topk_gate
from kimi_ops.reference import topk_gate as reference

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


def route(
    op: str,
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """weights [T, K] fp32 and ids [T, K] int64, best first, of logits [T, E].

    Groups count where `group_topk` is given; a group scores the sum of its ``topk // group_topk``
    best. Softmax after the choice sums logits, not scores, there: the groups are chosen in torch
    and the others' logits are -inf for the op.
    """
    _check.choice(op, "score_function", score_function, SCORES)
    softmax = score_function == "softmax"
    renormalize = not use_pre_softmax if softmax else topk > 1
    bias = None
    if expert_bias is not None:
        if softmax:
            only(op, "expert_bias", expert_bias, None, "a bias goes with sigmoid or sqrtsoftplus")
        bias = expert_bias.detach().float()
    groups: dict[str, Any] = {}
    if group_topk:
        if not num_groups or num_groups < group_topk or logits.shape[1] % num_groups:
            raise ValueError(
                f"{op}: num_groups: expected a divisor of {logits.shape[1]} experts from "
                f"group_topk = {group_topk} on, got {num_groups}; give both or neither"
            )
        best_of = topk // group_topk
        _check.between(op, "topk // group_topk", best_of, 1, logits.shape[1] // num_groups)
        if softmax and not use_pre_softmax:
            logits = _keep_best_groups(logits, num_groups, group_topk, best_of)
        else:
            groups = dict(num_groups=num_groups, topk_groups=group_topk, group_score_topk=best_of)
    gate = topk_gate(
        logits, topk, score_function=score_function, expert_bias=bias, renormalize=renormalize,
        scaling_factor=scaling_factor or 1.0, **groups,
    )  # fmt: skip
    return gate.weights, gate.indices.long()


def weigh(
    logits: Tensor, ids: Tensor, use_pre_softmax: bool, scaling: float | None, score_function: str
) -> Tensor:
    """The weights [T, K] fp32 that `route` gives to chosen ids [T, K], in their order; in torch."""
    if score_function == "softmax" and not use_pre_softmax:
        weights = logits.gather(1, ids).softmax(1, dtype=torch.float32)
    else:
        weights = reference.scores(logits, score_function).gather(1, ids)
        if score_function != "softmax" and ids.shape[1] > 1:
            weights = weights / (weights.sum(1, keepdim=True) + reference.EPSILON)
    return weights * (scaling or 1.0)


def spread(weights: Tensor, ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [T, E] probabilities in the dtype of the logits, 0 elsewhere, and the boolean map."""
    probs = torch.zeros_like(like).scatter(1, ids, weights.to(like.dtype))
    return probs, torch.zeros_like(like, dtype=torch.bool).scatter(1, ids, True)


def normalized_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores [T, E] fp32 that sum to 1 over the experts; differentiable, in torch."""
    scores = reference.scores(logits, score_function)
    if score_function == "softmax":
        return scores
    return scores / (scores.sum(1, keepdim=True) + reference.EPSILON)


def _keep_best_groups(logits: Tensor, groups: int, kept: int, best_of: int) -> Tensor:
    members = logits.detach().float().unflatten(1, (groups, -1))
    sums = members.topk(best_of, dim=2).values.sum(2)
    best = sums.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    out = torch.ones_like(sums, dtype=torch.bool).scatter(1, best, False)
    return logits.masked_fill(out.repeat_interleave(members.shape[2], dim=1), -torch.inf)
