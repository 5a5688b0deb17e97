# SPDX-License-Identifier: MIT
"""QK-Clip in plain PyTorch: the largest attention logit of each head, and the factor that brings it
under tau."""

from __future__ import annotations

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
    return torch.where(over, tau / max_logits, torch.ones_like(max_logits))


def scale_rows_(weight: Tensor, heads: int, start: int, stop: int, factor: Tensor) -> None:
    """Rows start..stop of every head's block of weight [heads * rows, in] times factor [heads]; x *
    1 keeps the bits."""
    blocks = weight.unflatten(0, (heads, weight.shape[0] // heads))
    blocks[:, start:stop].mul_(factor[:, None, None])
