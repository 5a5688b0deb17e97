# SPDX-License-Identifier: MIT
"""Router scores and top-k selection in plain torch, and the plan beside them."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference.permute import permute_plan
from kimi_ops.routing import PermutePlan

EPSILON = 1e-20  # added to the sum of the chosen scores, as in DeepSeek-V3's router


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def scores(logits: Tensor, score_function: str) -> Tensor:
    """s [T, E] from logits [T, E]; a NaN logit counts as -inf and scores 0."""
    z = _wide(logits)
    z = z.masked_fill(z.isnan(), -torch.inf).clamp(max=torch.finfo(z.dtype).max)
    if score_function == "sigmoid":
        return z.sigmoid()
    if score_function == "softmax":
        peak = z.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
        exponentials = (z - peak).exp()
        total = exponentials.sum(dim=-1, keepdim=True)
        return exponentials / total.masked_fill(total == 0, 1.0)
    softplus = torch.nn.functional.softplus(z)
    positive = softplus > 0  # the square root has no gradient at 0
    return softplus.masked_fill(~positive, 1.0).sqrt() * positive


def _rank(values: Tensor) -> Tensor:
    """Positions in descending order; equal values keep the lower position first."""
    return values.argsort(dim=-1, descending=True, stable=True)


def _select(choice: Tensor, k: int, num_groups: int, topk_groups: int, best_of: int) -> Tensor:
    """ids [T, k] of the best choices, experts outside the best groups excluded."""
    order = _rank(choice)
    if num_groups > 1:
        tokens, experts = choice.shape
        grouped = choice.view(tokens, num_groups, experts // num_groups)
        group_score = grouped.sort(dim=-1, descending=True).values[..., :best_of].sum(dim=-1)
        kept = _rank(group_score.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf))
        excluded = torch.ones_like(group_score, dtype=torch.bool)
        excluded = excluded.scatter(1, kept[:, :topk_groups], False)
        excluded = excluded.repeat_interleave(experts // num_groups, dim=1)
        last = excluded.gather(1, order).to(torch.uint8).argsort(dim=-1, stable=True)
        order = order.gather(1, last)
    return order[:, :k]


def _weigh(
    s: Tensor, ids: Tensor, valid: Tensor | None, renormalize: bool, scaling_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """weights, ids with -1 in every slot without an expert, counts."""
    experts = s.shape[1]
    slot = (ids >= 0) & (ids < experts)
    if valid is not None:
        slot = slot & valid.bool()[:, None]
    weights = s.gather(1, torch.where(slot, ids, 0).long()) * slot
    if renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + EPSILON)
    ids = torch.where(slot, ids, -1)
    return weights * scaling_factor, ids.int(), count(ids, experts)


def topk_gate(
    logits: Tensor,
    k: int | None = None,
    score_function: str = "sigmoid",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score_topk: int = 2,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    valid: Tensor | None = None,
    select: str = "scores",
    ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """weights [T, K], indices [T, K] int32, tokens_per_expert [E] int32."""
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.nan)
    s = scores(logits, score_function)
    if ids is None:
        assert k is not None
        z = _wide(logits.detach())
        choice = s.detach() if select == "scores" else z.clamp(max=torch.finfo(z.dtype).max)
        if expert_bias is not None:
            choice = choice + expert_bias
        choice = choice.masked_fill(choice.isnan() | logits.isnan(), -torch.inf)
        ids = _select(choice, k, num_groups, topk_groups, group_score_topk)
        if mask is not None:
            ids = torch.where(mask.expand_as(logits).gather(1, ids), ids, -1)
    return _weigh(s, ids, valid, renormalize, scaling_factor)


def count(indices: Tensor, num_experts: int) -> Tensor:
    """tokens_per_expert [E] int32 of ids [...], -1 left out; no host read, integer sums only."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=indices.device)
    flat = indices.flatten().long()
    flat = flat.masked_fill(flat < 0, num_experts)
    return counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32))[:num_experts]


def gate_plan(
    logits: Tensor, k: int, **options: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], PermutePlan]:
    """What `topk_gate` gives, and the plan of its ids."""
    gate = topk_gate(logits, k, **options)
    return gate, permute_plan(gate[1], logits.shape[1])
