# SPDX-License-Identifier: MIT
"""TransformerEngine's router functions: dense probabilities and maps of bytes or bits."""

from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import ScoreFunction
from kimi_ops.compat import _router
from kimi_ops.compat._arguments import only
from kimi_ops.moe.dense import normalized_scores, spread
from kimi_ops.moe.quantile import quantile_histogram_
from kimi_ops.moe.topk_gate import topk_gate


class RoutingMapFormat(IntEnum):
    """BYTEMAP: bool [T, E]. BITMAP_U8: uint8 [T, ceil(E / 8)], bit e % 8 of byte e // 8."""

    BYTEMAP = 0
    BITMAP_U8 = 1


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: ScoreFunction,
    expert_bias: Tensor | None,
    routing_map_format: str | int = RoutingMapFormat.BYTEMAP,
    topk_indices: Tensor | None = None,
    qb_histogram: Tensor | None = None,
    qb_bin_bounds: Tensor | None = None,
    qb_histogram_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them: `kimi_ops.topk_gate` with dense results.

    Softmax weighs before the choice (`use_pre_softmax`, not renormalised) or over the chosen.
    Sigmoid and sqrtsoftplus are divided by the sum of the chosen, but for one expert a token.

    Parameters
    ----------
    logits : Tensor [..., E], float32, bfloat16 or float16
    topk : int
    use_pre_softmax : bool
    num_groups, group_topk : int or None
        Only experts of the best groups take part; a group scores the sum of its
        ``topk // group_topk`` best scores (softmax over the chosen: best logits).
    scaling_factor : float or None
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}
    expert_bias : Tensor [E] or None
        Selects, never weighs; gets no gradient. Not with softmax.
    routing_map_format : RoutingMapFormat, its number, "bytemap" or "bitmap_u8"
    topk_indices : Tensor [..., topk], integers, optional
        Receives the ids, best first, and is the second result in place of the map.
    qb_histogram : Tensor [E, bins] int32, qb_bin_bounds : Tensor [2] float32, optional
        Quantile balancing: `kimi_ops.quantile_histogram_` of these logits. With sigmoid, no groups.
    qb_histogram_mode : {"two_kernel", "fused_atomic"}, optional
        No difference.

    Returns
    -------
    Tensor [..., E], the dtype of logits
        Weights, 0 for experts not chosen. Differentiable in logits.
    Tensor
        The map, or `topk_indices`.

    Notes
    -----
    Equal scores go to the lower expert. Experts are ranked in fp32, by score or, for softmax over
    the chosen, by logit.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import fused_topk_with_score_function
    >>> logits = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    >>> probs, routing_map = fused_topk_with_score_function(
    ...     logits, 2, False, None, None, None, "softmax", None)
    >>> probs.tolist(), routing_map.tolist()
    ([[0.0, 0.5, 0.5, 0.0]], [[False, True, True, False]])
    """
    op = "fused_topk_with_score_function"
    kind = _format(op, routing_map_format)
    _check.tensor(op, "logits", logits)
    flat = logits.reshape(-1, logits.shape[-1])
    if qb_histogram_mode is not None:
        _check.choice(op, "qb_histogram_mode", qb_histogram_mode, ("two_kernel", "fused_atomic"))
    if qb_histogram is not None:
        if qb_bin_bounds is None:
            raise ValueError(
                f"{op}: qb_bin_bounds: expected a tensor beside qb_histogram, got None"
            )
        only(op, "score_function", score_function, "sigmoid", "quantiles are of sigmoids there")
        only(op, "group_topk", group_topk or None, None, "quantiles are of all experts")
        quantile_histogram_(
            qb_histogram, flat, topk, bounds=qb_bin_bounds,
            expert_bias=None if expert_bias is None else expert_bias.detach().float(),
        )  # fmt: skip
    weights, ids = _router.route(
        op, flat, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function,
        expert_bias,
    )  # fmt: skip
    probs, routing_map = spread(weights, ids, flat)
    probs = probs.view(logits.shape)
    if topk_indices is not None:
        topk_indices.copy_(ids.view(topk_indices.shape))
        return probs, topk_indices
    return probs, _formatted(routing_map.view(logits.shape), kind)


def fused_compute_score_for_moe_aux_loss(
    logits: Tensor,
    topk: int,
    score_function: ScoreFunction,
    routing_map_format: str | int = RoutingMapFormat.BYTEMAP,
) -> tuple[Tensor, Tensor]:
    """Scores that sum to 1 over the experts, and the map of the `topk` best without any bias.

    Parameters
    ----------
    logits : Tensor [..., E], float32, bfloat16 or float16
    topk : int
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}
    routing_map_format : RoutingMapFormat, its number, "bytemap" or "bitmap_u8"

    Returns
    -------
    Tensor
        The map, as `fused_topk_with_score_function` gives it.
    Tensor [..., E] float32
        Differentiable in logits; computed in torch, the choice by `kimi_ops.topk_gate`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import fused_compute_score_for_moe_aux_loss
    >>> routing_map, scores = fused_compute_score_for_moe_aux_loss(
    ...     torch.tensor([[0.0, 0.0]]), 1, "sigmoid")
    >>> routing_map.tolist(), scores.tolist()
    ([[True, False]], [[0.5, 0.5]])
    """
    op = "fused_compute_score_for_moe_aux_loss"
    kind = _format(op, routing_map_format)
    _check.choice(op, "score_function", score_function, _router.SCORES)
    flat = logits.reshape(-1, logits.shape[-1])
    ids = topk_gate(flat.detach(), topk, score_function=score_function).indices.long()
    routing_map = torch.zeros_like(flat, dtype=torch.bool).scatter(1, ids, True)
    scores = normalized_scores(flat, score_function)
    return _formatted(routing_map.view(logits.shape), kind), scores.view(logits.shape)


def fused_moe_aux_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    num_experts: int,
    topk: int,
    coeff: float,
) -> Tensor:
    r"""The switch transformer's balancing loss, of counts from outside.

    .. math:: L = \frac{\text{coeff} \cdot E}{\text{topk} \cdot N^2}
        \sum_e n_e \sum_t p_{te}

    Parameters
    ----------
    probs : Tensor [T, E], float32, bfloat16 or float16
    tokens_per_expert : Tensor [E]
        n, of any real dtype; over all ranks and micro-batches that the loss speaks of.
    total_num_tokens : int or scalar Tensor
        N, tokens (not pairs) of the same; a tensor is not read on the host.
    num_experts : int
        E.
    topk : int
    coeff : float

    Returns
    -------
    Tensor, scalar, the dtype of probs
        Summed in fp32, in torch. Differentiable in probs.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import fused_moe_aux_loss
    >>> probs, counts = torch.full((4, 2), 0.5), torch.tensor([2, 2])
    >>> fused_moe_aux_loss(probs, counts, 4, 2, 1, 1.0).item()
    1.0
    """
    op = "fused_moe_aux_loss"
    _check.tensor(op, "probs", probs)
    _check.shape(op, "probs", probs, ("T", num_experts))
    _check.tensor(op, "tokens_per_expert", tokens_per_expert)
    _check.shape(op, "tokens_per_expert", tokens_per_expert, (num_experts,))
    total: Any = total_num_tokens
    total = total.to(probs.device, torch.float32) if isinstance(total, Tensor) else float(total)
    sums = probs.sum(0, dtype=torch.float32)
    loss = (sums * tokens_per_expert.to(probs.device, torch.float32)).sum()
    return (loss * (num_experts * coeff / topk) / total / total).to(probs.dtype)


def _format(op: str, value: str | int) -> RoutingMapFormat:
    if isinstance(value, str) and value in ("bytemap", "bitmap_u8"):
        return RoutingMapFormat[value.upper()]
    if isinstance(value, int) and int(value) in (0, 1):
        return RoutingMapFormat(int(value))
    raise ValueError(
        f"{op}: routing_map_format: expected 'bytemap', 'bitmap_u8' or a RoutingMapFormat, got "
        f"{value!r}"
    )


def _formatted(routing_map: Tensor, kind: RoutingMapFormat) -> Tensor:
    if kind == RoutingMapFormat.BYTEMAP:
        return routing_map
    bits = F.pad(routing_map.to(torch.uint8), (0, -routing_map.shape[-1] % 8))
    places = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.unflatten(-1, (-1, 8)) * places).sum(-1, dtype=torch.uint8)
