# SPDX-License-Identifier: MIT
"""Load balancing of the router in plain torch: bias rules and auxiliary losses."""

from typing import Any

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


def _sequences(
    tokens: int, num_sequences: int, offsets: Tensor | None, valid: Tensor | None, device: Any
) -> Tensor:
    """The sequence of each token [T]; N for one that belongs to none."""
    token = torch.arange(tokens, device=device)
    if offsets is None:
        sequence = token.div(max(tokens // num_sequences, 1), rounding_mode="floor")
    else:
        sequence = torch.searchsorted(offsets.long(), token, right=True)
    return sequence if valid is None else sequence.masked_fill(~valid.bool(), num_sequences)


def sequence_counts(
    indices: Tensor,
    num_experts: int,
    num_sequences: int = 1,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How often each expert was chosen [N, E], and how many tokens there are [N], int32."""
    sequences = num_sequences if offsets is None else len(offsets)
    of = _sequences(len(indices), sequences, offsets, valid, indices.device)
    ids = indices.long()
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    place = of[:, None] * (num_experts + 1) + ids
    counts = ids.new_zeros((sequences + 1) * (num_experts + 1), dtype=torch.int32)
    ones = torch.ones_like(place, dtype=torch.int32)
    counts = counts.scatter_add(0, place.flatten(), ones.flatten())
    tokens = counts.new_zeros(sequences + 1).scatter_add(0, of, torch.ones_like(of).int())
    return counts.view(sequences + 1, -1)[:sequences, :num_experts], tokens[:sequences]


def sequence_balance_loss(
    logits: Tensor,
    indices: Tensor,
    num_sequences: int = 1,
    score_function: str = "sigmoid",
    coefficient: float = 1e-4,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_tokens: Tensor | None = None,
) -> Tensor:
    tokens, experts = logits.shape
    if tokens == 0:
        return _wide(logits).sum() * 0.0
    sequences = num_sequences if offsets is None else len(offsets)
    counts, lengths = sequence_counts(indices, experts, num_sequences, offsets, valid)
    counts = counts if tokens_per_expert is None else tokens_per_expert
    lengths = lengths if sequence_tokens is None else sequence_tokens
    of = _sequences(tokens, sequences, offsets, valid, logits.device)
    s = scores(logits.masked_fill((of == sequences)[:, None], 0.0), score_function)
    share = s / (s.sum(dim=-1, keepdim=True) + EPSILON)
    total = share.new_zeros(sequences + 1, experts).index_add(0, of, share)[:sequences]
    length = lengths.to(share.dtype).clamp(min=1)[:, None]
    frequency = counts.to(share.dtype) * (experts / indices.shape[1]) / length
    return coefficient * (frequency * (total / length)).sum(dim=1).mean()


def quantile_histogram_(
    histogram: Tensor,
    logits: Tensor,
    cutoffs: Tensor,
    bounds: Tensor,
    score_function: str = "sigmoid",
    valid: Tensor | None = None,
) -> Tensor:
    """Adds the bins of ``cutoffs[t] - s[t, e]`` of all valid tokens, in place."""
    experts, bins = histogram.shape
    r = cutoffs[:, None].to(_wide(logits).dtype) - scores(logits, score_function)
    low, high = bounds.to(r.dtype)
    bin = ((r - low) * (bins / (high - low))).floor().clamp(0, bins - 1).long()
    place = bin + torch.arange(experts, device=bin.device) * bins
    ones = torch.ones_like(place, dtype=histogram.dtype)
    if valid is not None:
        ones = ones * valid.to(ones.dtype)[:, None]
    histogram.view(-1).scatter_add_(0, place.flatten(), ones.flatten())
    return histogram


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
