# SPDX-License-Identifier: MIT
"""QK-Clip in plain PyTorch: the largest attention logit of each head, and the factor that brings it
under tau."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Queries in one block: the scores of a block are [B, heads, QUERY_BLOCK, keys], never [S, S] at
# once.
QUERY_BLOCK = 128


def attention_max_logits(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """max over batch and visible pairs of scale * q k^T; q [B, heads, Sq, D], k [B, kv_heads, Sk,
    D] -> [heads].

    Query i stands at key position i + Sk - Sq: with a cache the queries are the last ones.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    largest = torch.full((heads,), float("-inf"), dtype=wide, device=q.device)
    if batch == 0 or queries == 0 or keys == 0:
        return largest
    # heads that share a key head lie side by side: [B, kv_heads, group, Sq, D] against [B,
    # kv_heads, 1, Sk, D]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, dim).to(wide)
    shared = k.reshape(batch, kv_heads, 1, keys, dim).to(wide)
    shift = keys - queries
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        seen = min(stop + shift, keys) if causal else keys
        scores = grouped[..., start:stop, :] @ shared[..., :seen, :].mT
        if causal:
            row = torch.arange(start + shift, stop + shift, device=q.device)
            hidden = torch.arange(seen, device=q.device) > row[:, None]
            scores = scores.masked_fill(hidden, float("-inf"))
        largest = torch.maximum(largest, scores.amax(dim=(0, -2, -1)).reshape(heads))
    return largest * scale


def clip_factor(max_logits: Tensor, tau: float) -> Tensor:
    """gamma = min(1, tau / S) for a finite S > tau, else exactly 1 (also for S <= 0, infinite S and
    NaN)."""
    over = torch.isfinite(max_logits) & (max_logits > tau)
    # a number over a tensor is its reciprocal times the number to torch: rounded twice
    return torch.where(over, torch.full_like(max_logits, tau) / max_logits, 1.0)


class Layer(NamedTuple):
    """Of `members` neighbouring heads of a layer the smallest gamma counts for all."""

    heads: int
    members: int = 1


class Rows(NamedTuple):
    """Rows `first_row` .. of a projection [blocks, block_rows, in] or of its bias: of each head's
    block the first `shared` rows take gamma^power, the `whole` next ones gamma."""

    layer: int
    blocks: int
    block_rows: int
    first_row: int
    shared: int
    whole: int


def clip_rows_(
    weights: Sequence[Tensor],
    max_logits: Tensor,
    layers: Sequence[Layer],
    rows: Sequence[Rows],
    powers: Sequence[float],
    tau: float,
) -> Tensor:
    """Scale the weights of all layers; gamma [H], of max_logits [H] of all layers. x * 1 keeps the
    bits."""
    of_layers = []
    for own, layer in zip(max_logits.split([x.heads for x in layers]), layers, strict=True):
        smallest = clip_factor(own, tau).unflatten(0, (-1, layer.members)).amin(1)
        of_layers.append(smallest.repeat_interleave(layer.members))
    for weight, of, power in zip(weights, rows, powers, strict=True):
        gamma = of_layers[of.layer].unflatten(0, (of.blocks, -1))[:, :1]
        one = torch.ones_like(gamma).expand(-1, of.block_rows - of.shared - of.whole)
        factors = (gamma**power).expand(-1, of.shared), gamma.expand(-1, of.whole), one
        here = torch.cat(factors, dim=1).flatten()[of.first_row :][: weight.shape[0]]
        weight.mul_(here.reshape(-1, *[1] * (weight.ndim - 1)))
    return torch.cat(of_layers)
