# SPDX-License-Identifier: MIT
"""The ops in JAX: custom calls of XLA on CPUs and CUDA, with gradients, under jit, vmap and
shard_map; without torch. docs/jax.md says more."""

from kimi_ops._forms import expert_capacity
from kimi_ops.arrays.door import Counts, DenseGate, Gate, Plan
from kimi_ops.arrays.formats import Fp8BlockWeight, Fp8Rows, Int4GroupWeight
from kimi_ops.jax.door import OPS as _OPS
from kimi_ops.jax.ragged import ragged_dot
from kimi_ops.optim.ns_schedule import ns_flops, tune_ns_restarts

adamw = _OPS.adamw
attention_max_logits = _OPS.attention_max_logits
clip_factor = _OPS.clip_factor
clip_rows = _OPS.clip_rows
dense_gate = _OPS.dense_gate
drop_to_capacity = _OPS.drop_to_capacity
fused_experts = _OPS.fused_experts
gate_plan = _OPS.gate_plan
grouped_gemm = _OPS.grouped_gemm
grouped_gemm_wgrad = _OPS.grouped_gemm_wgrad
muon_momentum = _OPS.muon_momentum
muon_update = _OPS.muon_update
newton_schulz = _OPS.newton_schulz
normalized_scores = _OPS.normalized_scores
permute = _OPS.permute
permute_plan = _OPS.permute_plan
permute_weights = _OPS.permute_weights
quantile_bias = _OPS.quantile_bias
quantile_histogram = _OPS.quantile_histogram
sequence_balance_loss = _OPS.sequence_balance_loss
sequence_counts = _OPS.sequence_counts
sort_chunks = _OPS.sort_chunks
squares = _OPS.squares
symmetric_matmul = _OPS.symmetric_matmul
syrk = _OPS.syrk
topk_gate = _OPS.topk_gate
unpermute = _OPS.unpermute
update_expert_bias = _OPS.update_expert_bias
z_loss = _OPS.z_loss

__all__ = [
    "Counts",
    "DenseGate",
    "Fp8BlockWeight",
    "Fp8Rows",
    "Gate",
    "Int4GroupWeight",
    "Plan",
    "adamw",
    "attention_max_logits",
    "clip_factor",
    "clip_rows",
    "dense_gate",
    "drop_to_capacity",
    "expert_capacity",
    "fused_experts",
    "gate_plan",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "muon_momentum",
    "muon_update",
    "newton_schulz",
    "normalized_scores",
    "ns_flops",
    "permute",
    "permute_plan",
    "permute_weights",
    "quantile_bias",
    "quantile_histogram",
    "ragged_dot",
    "sequence_balance_loss",
    "sequence_counts",
    "sort_chunks",
    "squares",
    "symmetric_matmul",
    "syrk",
    "topk_gate",
    "tune_ns_restarts",
    "unpermute",
    "update_expert_bias",
    "z_loss",
]
