# SPDX-License-Identifier: MIT
"""Kernels of a Kimi-K2-class mixture-of-experts model as drop-in PyTorch ops.

Every op has one name: ``kimi_ops.topk_gate``, ``torch.ops.kimi_ops.topk_gate``, in plain torch
``kimi_ops.reference.topk_gate.topk_gate``, in C ``kimi_topk_gate()``. The reference model is in
``kimi_ops.models.kimi_k2``.
"""

from kimi_ops import _program  # isort: skip  (before torch is loaded)
from kimi_ops import _native
from kimi_ops.info import info
from kimi_ops.invariance import is_batch_invariant, set_batch_invariant
from kimi_ops.moe.balance import sequence_balance_loss, update_expert_bias_, z_loss
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

del _program
__version__ = _native._C.version()
__all__ = [
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
    "TopkGate",
    "attention_max_logits",
    "eplb",
    "fused_experts",
    "gate_plan",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "info",
    "is_batch_invariant",
    "join_gate_up_",
    "move_experts",
    "muon_param_groups",
    "newton_schulz",
    "ns_flops",
    "permute",
    "permute_plan",
    "permute_weights",
    "qk_clip_",
    "replica_ids",
    "sequence_balance_loss",
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
