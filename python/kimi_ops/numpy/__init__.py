# SPDX-License-Identifier: MIT
"""The ops on NumPy's arrays, CuPy's, and any other that speaks DLPack, without torch.

Results are NumPy's arrays, or of the framework that the first array is of; bfloat16 is that of
ml_dtypes. There is no autograd: an op that has a gradient has a ``_backward`` beside it.
docs/numpy.md says more.
"""

from kimi_ops._forms import expert_capacity
from kimi_ops._library import _C
from kimi_ops.arrays.door import Counts, DenseGate, Gate, Plan
from kimi_ops.arrays.formats import Fp8BlockWeight, Fp8Rows, Int4GroupWeight
from kimi_ops.numpy.door import OPS as _OPS
from kimi_ops.numpy.gpu import stream
from kimi_ops.numpy.gradients import (
    fused_experts_backward,
    fused_experts_planned,
    sequence_balance_loss_backward,
    topk_gate_backward,
    unpermute_backward,
    z_loss_backward,
)
from kimi_ops.optim.ns_schedule import ns_flops, tune_ns_restarts

adamw_ = _OPS.adamw
attention_max_logits = _OPS.attention_max_logits
clip_factor = _OPS.clip_factor
clip_rows_ = _OPS.clip_rows
dense_gate = _OPS.dense_gate
drop_to_capacity = _OPS.drop_to_capacity
fused_experts = _OPS.fused_experts
gate_plan = _OPS.gate_plan
grouped_gemm = _OPS.grouped_gemm
grouped_gemm_wgrad = _OPS.grouped_gemm_wgrad
muon_momentum_ = _OPS.muon_momentum
muon_update_ = _OPS.muon_update
newton_schulz = _OPS.newton_schulz
normalized_scores = _OPS.normalized_scores
permute = _OPS.permute
permute_plan = _OPS.permute_plan
permute_weights = _OPS.permute_weights
quantile_bias = _OPS.quantile_bias
quantile_histogram_ = _OPS.quantile_histogram
sequence_balance_loss = _OPS.sequence_balance_loss
sequence_counts = _OPS.sequence_counts
sort_chunks = _OPS.sort_chunks
squares_ = _OPS.squares
symmetric_matmul = _OPS.symmetric_matmul
syrk = _OPS.syrk
topk_gate = _OPS.topk_gate
unpermute = _OPS.unpermute
update_expert_bias_ = _OPS.update_expert_bias
z_loss = _OPS.z_loss

num_threads, set_num_threads = _C.num_threads, _C.set_num_threads

__all__ = [
    "Counts",
    "DenseGate",
    "Fp8BlockWeight",
    "Fp8Rows",
    "Gate",
    "Int4GroupWeight",
    "Plan",
    "adamw_",
    "attention_max_logits",
    "clip_factor",
    "clip_rows_",
    "dense_gate",
    "drop_to_capacity",
    "expert_capacity",
    "fused_experts",
    "fused_experts_backward",
    "fused_experts_planned",
    "gate_plan",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "normalized_scores",
    "ns_flops",
    "num_threads",
    "permute",
    "permute_plan",
    "permute_weights",
    "quantile_bias",
    "quantile_histogram_",
    "sequence_balance_loss",
    "sequence_balance_loss_backward",
    "sequence_counts",
    "set_num_threads",
    "sort_chunks",
    "squares_",
    "stream",
    "symmetric_matmul",
    "syrk",
    "topk_gate",
    "topk_gate_backward",
    "tune_ns_restarts",
    "unpermute",
    "unpermute_backward",
    "update_expert_bias_",
    "z_loss",
    "z_loss_backward",
]
