# SPDX-License-Identifier: MIT
"""The router that TransformerEngine and Megatron share, over `topk_gate`."""

from typing import Any, get_args

from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import ScoreFunction
from kimi_ops.compat._arguments import only
from kimi_ops.moe.topk_gate import topk_gate

SCORES = get_args(ScoreFunction)


def route(
    op: str,
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: ScoreFunction,
    expert_bias: Tensor | None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """weights [T, K] fp32 and ids [T, K] int64, best first, of logits [T, E].

    Groups count where `group_topk` is given; a group scores the sum of its ``topk // group_topk``
    best. Softmax after the choice chooses by logits there, not by scores. Given `ids` are weighed.
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
        groups = dict(num_groups=num_groups, topk_groups=group_topk, group_score_topk=best_of)
    gate = topk_gate(
        logits, topk, score_function=score_function, expert_bias=bias, renormalize=renormalize,
        scaling_factor=scaling_factor or 1.0, ids=ids,
        select="logits" if softmax and not use_pre_softmax else "scores", **groups,
    )  # fmt: skip
    return gate.weights, gate.indices.long()
