# SPDX-License-Identifier: MIT
"""Multi-head latent attention: keys and values are expanded from one small latent vector a token.

    x -> q_a -> norm -> q_b  -> heads x [nope | rope]          q
    x -> kv_a -> [latent | k_rope]; latent -> norm -> kv_b -> heads x [k_nope | v]

k_rope is shared by all heads. A cache keeps [normed latent | rotated k_rope], kv_lora_rank +
qk_rope_head_dim values a token and layer (576 in Kimi K2), and reads them without expanding: the
rows of kv_b that make k_nope are applied to q, those that make v to the attention's output.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import attention_max_logits
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.few_rows import per_head
from kimi_ops.models.kimi_k2.layers import Linear, RMSNorm
from kimi_ops.models.kimi_k2.recompute import Recomputes
from kimi_ops.models.kimi_k2.rope import rotate
from kimi_ops.nn.stored import FixedBuffers
from kimi_ops.operators.count_once import recomputing

_LATENT_NORM_EPS = 1e-6  # the checkpoint's code uses its class default here, not rms_norm_eps
_MASK_ELEMENTS = 1 << 24  # of one block of queries over a cache: bounds the mask and the scores


def sees(documents: Tensor, start: int, end: int) -> Tensor:
    """[B, end - start, end]: which of the tokens before `end` those from `start` on see, by the
    numbers of their documents [B, n]. A token sees itself, so that no softmax is over nothing."""
    tokens = torch.arange(end, device=documents.device)
    ours, others = tokens[start:, None], tokens
    same = documents[:, start:end, None] == documents[:, None, :end]
    return (same & (others <= ours)) | (others == ours)


class LatentCache:
    """Latents of the tokens seen so far, for every layer, in memory allocated once.

    Parameters
    ----------
    config : KimiK2Config
    batch_size : int
    capacity : int
        Largest number of tokens a sequence.
    device, dtype
        Of the model's parameters; the defaults are torch's.
    """

    def __init__(
        self,
        config: KimiK2Config,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, batch_size, capacity, width)
        self.entries = torch.empty(shape, device=device, dtype=dtype)  # [L, B, capacity, width]
        self.length = 0  # tokens that every layer holds
        self.documents: Tensor | None = None  # [B, capacity]: 0, or -1 where there is padding

    @property
    def capacity(self) -> int:
        return self.entries.shape[2]

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes

    def write(self, layer: int, entry: Tensor) -> Tensor:
        """Store entry [B, S, width] behind the others; all tokens so far, [B, n, width]."""
        end = self.length + entry.shape[1]
        self.entries[layer, :, self.length : end] = entry
        return self.entries[layer, :, :end]

    def see(self, documents: Tensor | None, tokens: int) -> Tensor | None:
        """Note the padding among new tokens [B, S]; that of all so far, None where is none."""
        if documents is None and self.documents is None:
            return None
        end = self.length + tokens
        if self.documents is None:
            size, device = self.entries.shape[1:3], self.entries.device
            self.documents = torch.zeros(size, dtype=torch.int64, device=device)
        self.documents[:, self.length : end] = 0 if documents is None else documents
        return self.documents[:, :end]

    def seen(self, documents: Tensor | None, start: int, end: int) -> Tensor | None:
        """[B, end - start, end]: the tokens that those from `start` on see; None: all before."""
        return None if documents is None else sees(documents, start, end)

    def repeated(self, times: int) -> "LatentCache":
        """A cache that holds every sequence so often, side by side, with the same room."""
        other = copy.copy(self)
        other.entries = self.entries.repeat_interleave(times, dim=1)
        if self.documents is not None:
            other.documents = self.documents.repeat_interleave(times, dim=0)
        return other

    def chosen(self, rows: Tensor) -> "LatentCache":
        """A cache that holds the sequences of these rows [n] alone, with the same room."""
        other = copy.copy(self)
        other.entries = self.entries[:, rows]
        if self.documents is not None:
            other.documents = self.documents[rows]
        return other

    def check(self, batch_size: int, tokens: int, weight: Tensor) -> None:
        """Refuse `tokens` more of `batch_size` sequences, or a model with such a `weight`, where
        they do not fit: a ValueError, for a dtype a TypeError."""
        if self.entries.dtype != weight.dtype:
            raise TypeError(
                f"LatentCache: dtype: expected the model's {weight.dtype}, got "
                f"{self.entries.dtype}; make it with dtype=model.lm_head.weight.dtype"
            )
        if self.entries.device != weight.device:
            raise ValueError(
                f"LatentCache: device: expected the model's {weight.device}, got "
                f"{self.entries.device}; make it with device=model.lm_head.weight.device"
            )
        if batch_size != self.entries.shape[1]:
            raise ValueError(
                f"LatentCache: batch: expected {self.entries.shape[1]} sequences, got "
                f"{batch_size}; make a cache for this batch"
            )
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"LatentCache: capacity: expected at most {self.capacity - self.length} more "
                f"tokens, got {tokens}; make a larger cache"
            )


class Attention(FixedBuffers, Recomputes):
    """Latent attention of one layer; `max_logits` [heads] collects QK-Clip's statistic."""

    max_logits: Tensor

    def __init__(self, config: KimiK2Config, **factory: Any) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.num_heads = heads
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.softmax_scale = config.softmax_scale
        self.interleave = config.rope_interleave
        self.track_max_logits = False
        bias = config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, bias=False, **factory)
        else:
            rank = config.q_lora_rank
            self.q_a_proj = Linear(hidden, rank, bias=bias, **factory)
            self.q_a_layernorm = RMSNorm(rank, _LATENT_NORM_EPS, **factory)
            self.q_b_proj = Linear(rank, heads * config.qk_head_dim, bias=False, **factory)
        rank = config.kv_lora_rank
        width = rank + self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(hidden, width, bias=bias, **factory)
        self.kv_a_layernorm = RMSNorm(rank, _LATENT_NORM_EPS, **factory)
        expanded = heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = Linear(rank, expanded, bias=False, **factory)
        self.o_proj = Linear(heads * self.v_head_dim, hidden, bias=bias, **factory)
        statistic = torch.full(
            [heads], -torch.inf, dtype=torch.float32, device=factory.get("device")
        )
        self.register_buffer("max_logits", statistic, persistent=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LatentCache | None = None,
        layer: int = 0,
        documents: Tensor | None = None,
    ) -> Tensor:
        """[B, S, H] from x [B, S, H]; each token sees itself, those before it and the cache.

        With `documents` [B, n], a number for each token of the cache and of x, those of its number.
        """
        q_nope, q_rope = self._queries(x)
        tables = (cos[:, None], sin[:, None]) if cos.dim() == 3 else (cos, sin)  # beside the heads
        q_rope = rotate(q_rope, *tables, self.interleave)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        k_rope = rotate(k_rope, cos, sin, self.interleave)
        latent = self.kv_a_layernorm(latent)
        if cache is not None:
            entries = cache.write(layer, torch.cat((latent, k_rope), dim=-1))
            if cache.length > 0:
                return self._attend_latents(q_nope, q_rope, entries, cache, documents)
        return self._attend_expanded(q_nope, q_rope, latent, k_rope, documents)

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q_nope, q_rope [B, heads, S, *]."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(x)
        else:
            q = self.q_a_proj(x)
            with self.cheap():
                q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, q_rope

    def _attend_expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        documents: Tensor | None,
    ) -> Tensor:
        """No tokens before these: ordinary causal attention over expanded keys and values."""
        with self.cheap():
            kv = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, self.num_heads, -1, -1)), dim=-1)
        if self.track_max_logits and self.training and not recomputing():
            with torch.no_grad():
                largest = self._largest(q, k, documents)
                self.max_logits.copy_(torch.maximum(self.max_logits, largest))
        if q.device.type == "cpu":  # the fused CPU kernel wants one head size: zeros change nothing
            size = max(q.shape[-1], v.shape[-1])
            q, k, v = (F.pad(t, (0, size - t.shape[-1])) for t in (q, k, v))
        if documents is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
            return self._project(out[..., : self.v_head_dim])
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, :end],
                v[:, :, :end],
                attn_mask=sees(documents, start, end)[:, None],
                scale=self.softmax_scale,
            )
            for start, end in self._query_blocks(documents, q.shape[2])
        ]
        return self._project(torch.cat(parts, dim=2)[..., : self.v_head_dim])

    def _query_blocks(self, documents: Tensor, new: int) -> Iterator[tuple[int, int]]:
        """The last `new` tokens of [B, n] in runs whose scores of all heads stay bounded."""
        batch, total = documents.shape
        block = max(1, _MASK_ELEMENTS // (batch * self.num_heads * total))
        for start in range(total - new, total, block):
            yield start, min(start + block, total)

    def _largest(self, q: Tensor, k: Tensor, documents: Tensor | None) -> Tensor:
        """The largest logit of each head that a softmax sees, [heads] fp32."""
        if documents is None:
            return attention_max_logits(q, k, self.softmax_scale, causal=True)
        parts = []
        for start, end in self._query_blocks(documents, q.shape[2]):
            scores = q[:, :, start:end].float() @ k[:, :, :end].float().transpose(-1, -2)
            used = sees(documents, start, end) & (documents[:, start:end, None] >= 0)
            parts.append(scores.masked_fill(~used[:, None], -torch.inf).amax((0, 2, 3)))
        return torch.stack(parts).amax(0) * self.softmax_scale

    def _attend_latents(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        entries: Tensor,
        cache: LatentCache,
        documents: Tensor | None,
    ) -> Tensor:
        """Tokens after a cache: one shared key and value head, the cached entries [B, n, width].

        The heads become rows of one query: a head dimension of the keys, even one of stride 0,
        would make attention kernels copy the cache for every head.
        """
        rows = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        to_k, to_v = rows.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q = torch.cat((per_head(q_nope, to_k), q_rope), dim=-1)
        past, new = entries.shape[1] - q.shape[2], q.shape[2]
        block = max(1, _MASK_ELEMENTS // (self.num_heads * entries.shape[1]))
        if documents is not None:
            block = max(1, block // len(entries))
        parts = []
        for start in range(0, new, block):
            part = q[:, :, start : start + block]
            end = past + start + part.shape[2]
            mask = cache.seen(documents, past + start, end)
            parts.append(self._attend_shared(part, entries[:, None, :end], mask))
        return self._project(per_head(torch.cat(parts, dim=2), to_v.transpose(1, 2)))

    def _attend_shared(self, q: Tensor, entries: Tensor, sees: Tensor | None) -> Tensor:
        """[B, heads, S, rank] from q [B, heads, S, width] over entries [B, 1, n, width]; the last S
        entries belong to the queries; `sees` [B, S, n] says which they see."""
        heads, new = q.shape[1:3]
        mask = None
        if sees is not None:
            mask = sees.repeat(1, heads, 1)[:, None]
        elif new > 1:
            ones = torch.ones(new, entries.shape[2], dtype=torch.bool, device=q.device)
            mask = ones.tril(diagonal=entries.shape[2] - new).repeat(heads, 1)
        # The fused CPU kernel wants one head size: let it weigh the rotary keys too and drop them.
        v = entries if entries.device.type == "cpu" else entries[..., : self.kv_lora_rank]
        out = F.scaled_dot_product_attention(
            q.flatten(1, 2)[:, None], entries, v, attn_mask=mask, scale=self.softmax_scale
        )
        return out[:, 0, :, : self.kv_lora_rank].unflatten(1, (heads, new))

    def _project(self, out: Tensor) -> Tensor:
        with self.cheap():
            return self.o_proj(out.transpose(1, 2).flatten(2))

    def reset_statistics(self) -> None:
        """Forget the largest logits: -inf."""
        self.max_logits.fill_(-torch.inf)
