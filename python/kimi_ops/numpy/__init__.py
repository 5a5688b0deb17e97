# SPDX-License-Identifier: MIT
"""The ops on NumPy's arrays, and on any other that speaks DLPack on a CPU, without torch.

Results are NumPy's arrays; bfloat16 is that of ml_dtypes. There is no autograd: an op that has a
gradient has a ``_backward`` beside it. docs/numpy.md says more.
"""

from kimi_ops._library import _C
from kimi_ops.numpy.products import (
    attention_max_logits,
    fused_experts,
    fused_experts_backward,
    fused_experts_planned,
    grouped_gemm,
    grouped_gemm_wgrad,
    newton_schulz,
)
from kimi_ops.numpy.routing import (
    Counts,
    Gate,
    Plan,
    permute,
    permute_plan,
    quantile_histogram_,
    sequence_balance_loss,
    sequence_balance_loss_backward,
    sort_chunks,
    topk_gate,
    topk_gate_backward,
    topk_gate_given,
    unpermute,
    unpermute_backward,
    update_expert_bias_,
    z_loss,
    z_loss_backward,
)

set_num_threads, num_threads = _C.set_num_threads, _C.num_threads

__all__ = [
    "Counts",
    "Gate",
    "Plan",
    "attention_max_logits",
    "fused_experts",
    "fused_experts_backward",
    "fused_experts_planned",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "newton_schulz",
    "num_threads",
    "permute",
    "permute_plan",
    "quantile_histogram_",
    "sequence_balance_loss",
    "sequence_balance_loss_backward",
    "set_num_threads",
    "sort_chunks",
    "topk_gate",
    "topk_gate_backward",
    "topk_gate_given",
    "unpermute",
    "unpermute_backward",
    "update_expert_bias_",
    "z_loss",
    "z_loss_backward",
]
