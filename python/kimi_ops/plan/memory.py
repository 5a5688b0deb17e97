# SPDX-License-Identifier: MIT
"""Bytes of the fullest rank.

Training, ZeRO-1 as `MuonClip(process_group=...)` shares it: every rank holds bf16 weights and fp32
gradients of its stage; fp32 masters with Muon's momentum (8 bytes a parameter) or AdamW's moments
(12) belong to one of the ranks that hold the parameter. Stage s of pp keeps the activations of
min(pp - s, micro-batches) micro-batches (1F1B).

Serving: quantised weights, the latent cache, buffers. A prompt longer than a step's tokens is in
the cache whole, and its keys and values are expanded for the last of them.
"""

from dataclasses import dataclass

from kimi_ops.plan.counts import WEIGHT_BYTES, Counts
from kimi_ops.plan.work import Layout, Work

__all__ = ["Memory", "activation_bytes", "buffer_bytes", "memory"]


def activation_bytes(counts: Counts, work: Work, recompute: str, *, sparse: bool) -> float:
    """What one token leaves behind in one layer for its backward.

    none: every input of a product, a norm or an activation, in bf16; selective: norms, expansions
    of latents, SwiGLU and down products are computed again; full: only the layer's input stays.
    """
    config = counts.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim
    if recompute == "full":
        return 2.0 * hidden
    values = 2.0 * hidden + latents + heads * config.v_head_dim + 2 * heads  # and fp32 log-sums
    expanded = heads * (2 * config.qk_head_dim + config.v_head_dim)
    values += 0 if recompute == "selective" else 2 * hidden + latents + expanded
    if config.q_lora_rank is None and recompute == "selective":
        values += heads * config.qk_head_dim  # no latent to expand queries from
    if sparse:
        width, shared = config.moe_intermediate_size, config.n_shared_experts
        rows = config.num_experts_per_tok * work.skew
        values += rows * (hidden + 2 * width) + 2 * width * shared + 2 * config.n_routed_experts
        values += 0 if recompute == "selective" else rows * (hidden + width) + width * shared
    else:
        values += config.intermediate_size * (2 if recompute == "selective" else 3)
    return 2.0 * values


def buffer_bytes(counts: Counts, work: Work, ep: int) -> float:
    """Slots for the most that may arrive: dispatch from every rank, combine from min(ep, K).

    Sent by choice, a token comes to a rank once for each of its experts, all K results come home.
    """
    if ep == 1:
        return 0.0
    config = counts.config
    hidden, k = config.hidden_size, config.num_experts_per_tok
    message = work.row_bytes(hidden) + 8 * k + 8  # ids, weights, source
    arriving, home = ep, min(ep, k)
    if work.decoding:
        arriving, home = ep * min(k, -(-work.slots(config.n_routed_experts) // ep)), k
    return work.tokens * (arriving * message + home * 2.0 * hidden)


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU by kind, and those that it keeps in the host's memory."""

    parts: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory(counts: Counts, work: Work, layout: Layout) -> Memory:
    """Of a rank of the stage that needs most."""
    stages = enumerate(layout.stages(counts.config.num_hidden_layers))
    found = (_stage(counts, work, layout, number, layers) for number, layers in stages)
    return max(found, key=lambda memory: (memory.total, memory.host))


def _stage(counts: Counts, work: Work, layout: Layout, number: int, layers: range) -> Memory:
    experts, matrices, rest = counts.stage(layers, layout.ep, work.redundant)
    config = counts.config
    kinds = [config.is_moe_layer(n) for n in layers]
    kept = {k: activation_bytes(counts, work, layout.recompute, sparse=k) for k in set(kinds)}
    whole = {k: activation_bytes(counts, work, "none", sparse=k) for k in set(kinds)}
    buffers = buffer_bytes(counts, work, layout.ep) if any(kinds) else 0.0
    head = config.num_hidden_layers - 1 in layers
    if not work.training:
        of_experts, of_others = WEIGHT_BYTES[work.weights]
        cache = 2.0 * (config.kv_lora_rank + config.qk_rope_head_dim) * len(layers)
        expanded = 0 if work.decoding else work.cached - work.tokens
        expanded *= config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        logits = 4.0 * config.vocab_size * work.predicted * head
        parts = {
            "weights": experts * of_experts + matrices * of_others + 2.0 * rest,
            "latent cache": work.cached * cache,
            "activations": work.tokens * max(whole.values()) + 2.0 * expanded + logits,
        }
        return Memory({**parts, "EP buffers": buffers})
    held = experts + matrices + rest
    muon = experts / layout.replicas + matrices / layout.dp
    state = muon * (4 + work.momentum_bytes) + rest / layout.dp * 12
    in_flight = work.at_once * min(layout.pp - number, layout.turns(work))
    alive = in_flight * sum(kept[k] for k in kinds)
    once = max(whole[k] - kept[k] for k in kept)  # of the layer that is computed again
    once += 8.0 * config.vocab_size * head  # fp32 logits and their gradient
    alive += work.at_once * once
    parts = {
        "weights": 2.0 * held,
        "gradients": float(work.gradient_bytes * held),
        "optimizer": 0.0 if work.offload else state,
        "activations": work.tokens * alive,
        "EP buffers": work.at_once * buffers,
    }
    return Memory(parts, host=state if work.offload else 0.0)
