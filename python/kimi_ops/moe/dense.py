# SPDX-License-Identifier: MIT
"""The router's result as dense [T, E] matrices, and experts of limited capacity.

Plain torch around `topk_gate` and `permute_plan`: the forms of other systems, off the hot path.
"""

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops._forms import expert_capacity as expert_capacity
from kimi_ops.choices import DropRule, ScoreFunction
from kimi_ops.moe.permute import permute_plan, ranks
from kimi_ops.moe.topk_gate import TopkGate, topk_gate
from kimi_ops.reference import topk_gate as reference
from kimi_ops.routing import as_int32

_SCORES, _RULES = get_args(ScoreFunction), get_args(DropRule)


class DenseGate(NamedTuple):
    """What :func:`dense_gate` returns."""

    probs: Tensor  #: [..., E], the dtype of logits
    routing_map: Tensor  #: [..., E] bool
    tokens_per_expert: Tensor  #: [E] int32


def dense_gate(logits: Tensor, k: int | None = None, **options: Any) -> DenseGate:
    """`topk_gate` with a place for every expert: weights, 0 elsewhere, and who was chosen.

    Parameters
    ----------
    logits : Tensor [..., E], float32, bfloat16 or float16
    k : int
    **options
        As `topk_gate` takes them.

    Returns
    -------
    DenseGate
        ``probs`` [..., E] in the dtype of the logits, ``routing_map`` [..., E] bool, which
        `permute_plan` takes, ``tokens_per_expert`` [E] int32. Differentiable in logits; where given
        ids repeat an expert its weights add up.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `topk_gate`.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> gate = kimi_ops.dense_gate(torch.tensor([[0.0, 2.0, 2.0]]), 2)
    >>> gate.probs.tolist(), gate.routing_map.tolist()
    ([[0.0, 0.5, 0.5]], [[False, True, True]])
    """
    gate = topk_gate(logits, k, **options)
    return DenseGate(*spread(gate.weights, gate.indices, logits), gate.tokens_per_expert)


def spread(weights: Tensor, ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [..., E] probabilities in the dtype of `like`, 0 elsewhere, and the boolean map."""
    experts = like.shape[-1]
    place = torch.where(ids < 0, experts, ids).long()  # a spare column
    wide = weights.new_zeros(*like.shape[:-1], experts + 1)
    probs = wide.scatter_add(-1, place, weights)[..., :experts].to(like.dtype)
    chosen = torch.zeros_like(wide, dtype=torch.bool).scatter(-1, place, True)
    return probs, chosen[..., :experts]


def normalized_scores(logits: Tensor, score_function: ScoreFunction = "sigmoid") -> Tensor:
    """Scores that sum to 1 over all experts: ``s / (sum s + 1e-20)``; what balance losses average.

    Parameters
    ----------
    logits : Tensor [..., E], any floating dtype
        NaN counts as -inf and scores 0.
    score_function : {"sigmoid", "softmax", "sqrtsoftplus"}

    Returns
    -------
    Tensor [..., E] float32 (float64 of float64)
        Differentiable any number of times: plain torch.

    Raises
    ------
    TypeError, ValueError
        No tensor, or another name.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> kimi_ops.normalized_scores(torch.zeros(1, 4)).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    op = "normalized_scores"
    _check.tensor(op, "logits", logits)
    _check.choice(op, "score_function", score_function, _SCORES)
    scores = reference.scores(logits, score_function)
    if score_function == "softmax":
        return scores
    return scores / (scores.sum(-1, keepdim=True) + reference.EPSILON)


def drop_to_capacity(
    weights: Tensor, indices: Tensor, num_experts: int, capacity: int, *, by: DropRule = "weights"
) -> TopkGate:
    """Leave every expert its `capacity` best pairs, or its first, and drop the others.

    Parameters
    ----------
    weights : Tensor [T, K], any floating dtype
    indices : Tensor [T, K] int32 or int64
        Ids -1 and E are dropped pairs already.
    num_experts : int
        E, at most 1024.
    capacity : int
        From `expert_capacity`.
    by : {"weights", "position"}
        Pairs with the largest weights stay, of equal ones the first in the order (token, slot), or
        the first in that order alone. NaN counts as -inf, as in `topk_gate`.

    Returns
    -------
    TopkGate
        ``weights`` (0 for a dropped pair; not renormalised; differentiable), ``indices`` int32 (-1
        for a dropped pair), ``tokens_per_expert`` [E] int32 of what stays.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype or shape, an id outside -1 .. E as `permute_plan` sees it, another rule.

    Notes
    -----
    ``permute_plan(indices, E, capacity=capacity)`` pads what stays to [E, capacity] rows.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> w, ids = torch.tensor([[0.1], [0.9], [0.5]]), torch.tensor([[0], [0], [0]])
    >>> kimi_ops.drop_to_capacity(w, ids, 2, 2).indices.tolist()
    [[-1], [0], [0]]
    >>> kimi_ops.drop_to_capacity(w, ids, 2, 2, by="position").indices.tolist()
    [[0], [0], [-1]]
    """
    op = "drop_to_capacity"
    _check.choice(op, "by", by, _RULES)
    _check.tensor(op, "weights", weights)
    _check.tensor(op, "indices", indices)
    _check.dtype(op, "indices", indices, (torch.int32, torch.int64))
    _check.shape(op, "indices", indices, ("T", "K"))
    _check.shape(op, "weights", weights, tuple(indices.shape), "one for each id")
    _check.between(op, "capacity", capacity, 0, 2**31 - 1)
    ids = as_int32(indices)
    pairs = ids.reshape(-1, 1)
    order = torch.arange(len(pairs), device=ids.device)
    if by == "weights":
        size = weights.detach().flatten()
        size = size.masked_fill(size.isnan(), -torch.inf)
        order = size.argsort(descending=True, stable=True)
        pairs = pairs[order]
    plan = permute_plan(pairs, num_experts)
    kept = (plan.row_map >= 0) & (ranks(plan, pairs)[1] < capacity)
    stays = torch.empty_like(kept[:, 0]).scatter(0, order, kept[:, 0]).view_as(ids)
    counts = plan.tokens_per_expert.clamp(max=capacity)
    return TopkGate(torch.where(stays, weights, 0.0), torch.where(stays, ids, -1), counts)
