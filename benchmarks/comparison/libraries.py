# SPDX-License-Identifier: MIT
"""The other libraries: which are installed, and how each does the work, by its public functions.

A library that is not there, that has no way of one work, or that fails, is named with the reason.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_fused_experts import transformers_experts
from benchmarks.comparison.work import Experts, Products, Router, Rows, Way, Ways, Work

Adapter = Callable[[Any, Any], Ways]  # the imported module and the work


@dataclass(frozen=True)
class Library:
    name: str
    distribution: str  # its version's
    modules: dict[type, str]  # by work: the module that has the function
    adapters: dict[type, Adapter]
    why_not: str = "has none of this work as a function"  # where there is no adapter at all

    @property
    def version(self) -> str | None:
        """None where it is not installed."""
        top = next(iter(self.modules.values()), self.distribution.replace("-", "_")).split(".")[0]
        if importlib.util.find_spec(top) is None:
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"

    def ways(self, work: Work) -> Ways:
        """Its ways of the work; raises what the import raises."""
        adapter = self.adapters.get(type(work))
        if adapter is None or self.version is None:
            return {}
        return adapter(importlib.import_module(self.modules[type(work)]), work)


def _transformers(_: Any, work: Experts) -> Ways:
    ids, weights = work.ids.long(), (work.w_gate_up, work.w_down)
    ways = ("eager", "grouped_mm")  # batched_mm copies a matrix for each pair
    made = {way: transformers_experts(work.case, way, weights) for way in ways}
    return {
        f"transformers {way}": Way(lambda e=experts: e(work.x, ids, work.weights))
        for way, experts in made.items()
    }


def _vllm_router(module: Any, work: Router) -> Ways:
    def call() -> Any:
        return module.fused_topk(work.logits, work.logits, work.k, True)

    return {"vllm": Way(call, lambda found: work.dense(*found[:2]))}


def _vllm_experts(module: Any, work: Experts) -> Ways:
    operands = (work.x, work.w_gate_up, work.w_down, work.weights, work.ids)
    return {"vllm": Way(lambda: module.fused_experts(*operands))}


def _te_router(module: Any, work: Router) -> Ways:
    arguments = (work.k, False, None, None, None, "softmax", None)

    def call() -> Any:
        return module.fused_topk_with_score_function(work.logits, *arguments)

    return {"transformer_engine": Way(call, lambda found: found[0].float())}


def _te_rows(module: Any, work: Rows) -> Ways:
    def call() -> Tensor:
        pairs = work.ids.numel()
        rows, row_map = module.moe_permute(work.x, work.ids, pairs, map_type="index")
        return module.moe_unpermute(rows, row_map, merging_probs=work.weights, map_type="index")

    return {"transformer_engine": Way(call)}


def _megatron_router(module: Any, work: Router) -> Ways:
    def call() -> Any:
        return module.topk_routing_with_score_function(work.logits, work.k)

    return {"megatron": Way(call, lambda found: found[0].float())}


def _megatron_rows(module: Any, work: Rows) -> Ways:
    tokens, k = work.ids.shape
    ids = work.ids.long()
    probs = work.weights.new_zeros(tokens, work.experts).scatter_(1, ids, work.weights)
    routing_map = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, ids, True)

    def call() -> Tensor:
        rows, _, order, *_ = module.permute(work.x, routing_map, num_out_tokens=tokens * k)
        shape = work.x.shape
        return module.unpermute(rows, order, shape, probs=probs, routing_map=routing_map)

    return {"megatron": Way(call)}


def _grouped_gemm_rows(module: Any, work: Rows) -> Ways:
    def call() -> Tensor:
        rows, row_map = module.permute(work.x, work.ids)
        return module.unpermute(rows, row_map, work.weights)

    return {"grouped_gemm": Way(call)}


def _grouped_gemm(module: Any, work: Products) -> Ways:
    return {"grouped_gemm": Way(lambda: module.gmm(work.a, work.weight, work.sizes, trans_b=True))}


def _deep_gemm(module: Any, work: Products) -> Ways:
    experts = torch.arange(len(work.sizes), dtype=torch.int32)
    layout = experts.repeat_interleave(work.sizes).to(work.a.device)
    out = work.a.new_empty(len(work.a), work.weight.shape[1])

    def call() -> Tensor:
        module.m_grouped_bf16_gemm_nt_contiguous(work.a, work.weight, out, layout)
        return out

    return {"deep_gemm": Way(call)}


def _liger(module: Any, work: Experts) -> Ways:
    operands = (work.x, work.w_gate_up, work.w_down, work.ids, work.weights)
    return {"liger": Way(lambda: module.LigerFusedMoEFunction.apply(*operands))}


def _flashinfer(module: Any, work: Experts) -> Ways:
    up_first = torch.cat(work.w_gate_up.chunk(2, dim=1)[::-1], dim=1)

    def call() -> Any:
        return module.cutlass_fused_moe(
            work.x, work.ids, work.weights, up_first, work.w_down, work.x.dtype, quant_scales=[]
        )

    return {"flashinfer": Way(call, lambda y: y if isinstance(y, Tensor) else y[0])}


_MEGATRON = "megatron.core.transformer.moe.moe_utils"
_VLLM = "vllm.model_executor.layers.fused_moe"
LIBRARIES = (
    Library("transformers", "transformers", {Experts: "transformers"}, {Experts: _transformers}),
    Library(
        "vllm", "vllm", {Router: _VLLM, Experts: _VLLM},
        {Router: _vllm_router, Experts: _vllm_experts},
    ),
    Library(
        "transformer_engine", "transformer-engine",
        {Router: "transformer_engine.pytorch.router", Rows: "transformer_engine.pytorch"},
        {Router: _te_router, Rows: _te_rows},
    ),
    Library(
        "megatron", "megatron-core", {Router: _MEGATRON, Rows: _MEGATRON},
        {Router: _megatron_router, Rows: _megatron_rows},
    ),
    Library(
        "grouped_gemm", "grouped-gemm",
        {Rows: "grouped_gemm.ops", Products: "grouped_gemm.ops"},
        {Rows: _grouped_gemm_rows, Products: _grouped_gemm},
    ),
    Library("deep_gemm", "deep-gemm", {Products: "deep_gemm"}, {Products: _deep_gemm}),
    Library("liger", "liger-kernel", {Experts: "liger_kernel.ops.fused_moe"}, {Experts: _liger}),
    Library(
        "flashinfer", "flashinfer-python", {Experts: "flashinfer.fused_moe"},
        {Experts: _flashinfer},
    ),
    Library("sglang", "sglang", {}, {}, "has vLLM's experts behind a server's state"),
    Library("deep_ep", "deep-ep", {}, {}, "wants several GPUs"),
)  # fmt: skip
