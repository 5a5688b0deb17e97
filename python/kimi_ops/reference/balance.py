# SPDX-License-Identifier: MIT
"""Load balancing of the router in plain torch: bias rules and auxiliary losses."""

import torch
from torch import Tensor

from kimi_ops.reference.topk_gate import EPSILON, _wide, scores


def update_expert_bias_(
    bias: Tensor, tokens_per_expert: Tensor, rate: float, centered: bool = False
) -> Tensor:
    load = tokens_per_expert.double()
    direction = (load.mean() - load).sign()
    if centered:
        direction = direction - direction.mean()
    return bias.add_((rate * direction).to(bias.dtype))


def sequence_balance_loss(
    logits: Tensor,
    indices: Tensor,
    num_sequences: int = 1,
    score_function: str = "sigmoid",
    coefficient: float = 1e-4,
) -> Tensor:
    tokens, experts = logits.shape
    if tokens == 0:
        return _wide(logits).sum() * 0.0
    length, k = tokens // num_sequences, indices.shape[1]
    s = scores(logits, score_function).view(num_sequences, length, experts)
    share = s / (s.sum(dim=-1, keepdim=True) + EPSILON)
    mean_share = share.mean(dim=1)  # P [num_sequences, E]
    ids = indices.view(num_sequences, length * k).long()
    ids = ids.masked_fill((ids < 0) | (ids >= experts), experts)
    load = torch.zeros(num_sequences, experts + 1, dtype=torch.int32, device=logits.device)
    load = load.scatter_add(1, ids, torch.ones_like(ids, dtype=torch.int32))[:, :experts]
    frequency = load.to(share.dtype) * (experts / (k * length))  # f [num_sequences, E]
    return coefficient * (frequency * mean_share).sum(dim=1).mean()


def z_loss(logits: Tensor, coefficient: float = 1e-3, valid: Tensor | None = None) -> Tensor:
    z = _wide(logits)
    z = z.masked_fill(z.isnan(), -torch.inf).clamp(max=torch.finfo(z.dtype).max)
    empty = z.isneginf().all(dim=-1)  # nothing to sum: the loss is inf, the gradient 0
    lse = z.masked_fill(empty[:, None], 0.0).logsumexp(dim=-1)
    square = lse.square().masked_fill(empty, torch.inf)
    if valid is None:
        return coefficient * square.sum() / max(logits.shape[0], 1)
    keep = valid.bool()
    square = square.masked_fill(~keep, 0.0)
    return coefficient * square.sum() / keep.sum().clamp(min=1)
