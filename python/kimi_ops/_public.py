# SPDX-License-Identifier: MIT
"""The public names, all of which work on torch's tensors or beside them. Loading this module loads
torch: kimi_ops/__init__.py does when somebody asks for one of them."""

from kimi_ops import activations, nn  # noqa: F401  (submodules, there without an import)
from kimi_ops.building import get_cmake_dir, get_include, get_pkgconfig_dir
from kimi_ops.facts import info
from kimi_ops.invariance import is_batch_invariant, set_batch_invariant
from kimi_ops.memory import release_kept_memory
from kimi_ops.moe.balance import (
    SequenceCounts,
    sequence_balance_loss,
    sequence_counts,
    update_expert_bias_,
    z_loss,
)
from kimi_ops.moe.dense import (
    DenseGate,
    dense_gate,
    drop_to_capacity,
    expert_capacity,
    normalized_scores,
)
from kimi_ops.moe.eplb import ExpertPlacement, eplb
from kimi_ops.moe.expert_loads import ExpertLoads
from kimi_ops.moe.fused_experts import fused_experts, join_gate_up_
from kimi_ops.moe.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from kimi_ops.moe.permute import (
    PermutePlan,
    permute,
    permute_plan,
    permute_weights,
    sort_chunks,
    unpermute,
)
from kimi_ops.moe.quantile import quantile_bias, quantile_histogram_
from kimi_ops.moe.quantized import Fp8BlockWeight, Fp8Rows, Int4GroupWeight
from kimi_ops.moe.replicas import replica_ids
from kimi_ops.moe.topk_gate import TopkGate, gate_plan, topk_gate
from kimi_ops.optim.muon_clip import MuonClip, QKClip
from kimi_ops.optim.muon_groups import muon_param_groups
from kimi_ops.optim.newton_schulz import newton_schulz, symmetric_matmul, syrk
from kimi_ops.optim.ns_schedule import ns_flops, tune_ns_restarts
from kimi_ops.optim.qk_clip import attention_max_logits, qk_clip_
from kimi_ops.parallel.expert_parallel import ExpertParallel
from kimi_ops.parallel.local import LocalWorld
from kimi_ops.parallel.move import move_experts

__all__ = [
    "DenseGate",
    "ExpertLoads",
    "ExpertParallel",
    "ExpertPlacement",
    "Fp8BlockWeight",
    "Fp8Rows",
    "Int4GroupWeight",
    "LocalWorld",
    "MuonClip",
    "PermutePlan",
    "QKClip",
    "SequenceCounts",
    "TopkGate",
    "attention_max_logits",
    "dense_gate",
    "drop_to_capacity",
    "eplb",
    "expert_capacity",
    "fused_experts",
    "gate_plan",
    "get_cmake_dir",
    "get_include",
    "get_pkgconfig_dir",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "info",
    "is_batch_invariant",
    "join_gate_up_",
    "move_experts",
    "muon_param_groups",
    "newton_schulz",
    "normalized_scores",
    "ns_flops",
    "permute",
    "permute_plan",
    "permute_weights",
    "qk_clip_",
    "quantile_bias",
    "quantile_histogram_",
    "release_kept_memory",
    "replica_ids",
    "sequence_balance_loss",
    "sequence_counts",
    "set_batch_invariant",
    "sort_chunks",
    "symmetric_matmul",
    "syrk",
    "topk_gate",
    "tune_ns_restarts",
    "unpermute",
    "update_expert_bias_",
    "z_loss",
]
