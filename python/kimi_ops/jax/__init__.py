# SPDX-License-Identifier: MIT
"""The ops in JAX: custom calls of XLA on CPUs and CUDA, with gradients, under jit, vmap and
shard_map; without torch. docs/jax.md says more."""

from kimi_ops.jax.products import (
    attention_max_logits,
    fused_experts,
    grouped_gemm,
    grouped_gemm_wgrad,
    newton_schulz,
    ragged_dot,
)
from kimi_ops.jax.routing import (
    Gate,
    Plan,
    permute,
    permute_plan,
    sequence_balance_loss,
    sort_chunks,
    topk_gate,
    unpermute,
    update_expert_bias,
    z_loss,
)

__all__ = [
    "Gate",
    "Plan",
    "attention_max_logits",
    "fused_experts",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "newton_schulz",
    "permute",
    "permute_plan",
    "ragged_dot",
    "sequence_balance_loss",
    "sort_chunks",
    "topk_gate",
    "unpermute",
    "update_expert_bias",
    "z_loss",
]
