# SPDX-License-Identifier: MIT
"""What calls with a bad argument say, and that good ones are taken.

A case is its own name, `op(changes)`: `op` of `kimi_ops` (of `torch.ops.kimi_ops` after `ops.`) is
called with the arguments of `good`, changed in one place. `dual.` before it passes a tensor with a
forward-mode tangent, `twice.` differentiates the result twice, `step.` steps an optimizer. A new
case is a new key of messages.json; what it says is computed.
"""

import math
import operator
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy  # noqa: F401  (cases name it)
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import kimi_ops
import kimi_ops.models.kimi_k2


def f(*shape: int) -> Tensor:
    """[*shape] float32, small whole numbers."""
    return (torch.arange(math.prod(shape)) % 7 - 3).float().reshape(shape)


def i(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def g(*shape: int) -> Tensor:
    """`f` that requires a gradient."""
    return f(*shape).requires_grad_()


def ids() -> Tensor:
    return i([0, 1], [1, 2], [2, -1], [3, 0])


def plan() -> kimi_ops.PermutePlan:
    return kimi_ops.permute_plan(ids(), 4)


def fp8(*shape: int) -> Tensor:
    return f(*shape).to(torch.float8_e4m3fn)


def fp8_weight(*shape: int) -> kimi_ops.Fp8BlockWeight:
    return kimi_ops.Fp8BlockWeight.quantize(f(*shape))


def int4_weight(*shape: int) -> kimi_ops.Int4GroupWeight:
    return kimi_ops.Int4GroupWeight.quantize(f(*shape))


def rows(*shape: int) -> kimi_ops.Fp8Rows:
    return kimi_ops.Fp8Rows.quantize(f(*shape))


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


def across(x: Tensor) -> Tensor:
    """x with another order of strides."""
    return x.mT.contiguous().mT


def group() -> Any:
    """The only rank of a world of one."""
    return kimi_ops.LocalWorld(1).run(lambda group: group)[0]


def layer(**changes: Any) -> nn.Module:
    """An attention layer as QKClip and muon_param_groups know them."""
    module = nn.Module()
    module.q_proj, module.kv_b_proj = nn.Linear(8, 12), nn.Linear(8, 14)
    numbers = {"num_heads": 2, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
    for name, value in {**numbers, "max_logits": torch.ones(2), **changes}.items():
        setattr(module, name, value)
    for name in [name for name, value in changes.items() if value is None]:
        delattr(module, name)
    return module


def sparse_gradient() -> list[Tensor]:
    """A parameter whose gradient is sparse."""
    table = nn.Embedding(4, 6, sparse=True)
    table(i(1)).sum().backward()
    return [table.weight]


def overlapping(*shape: int) -> dict[str, Tensor]:
    """a and out of a grouped product in one piece of memory."""
    memory = f(40 + math.prod(shape))
    return {"a": memory[:48].view(6, 8), "out": memory[40:].view(shape)}


def good() -> dict[str, dict[str, Any]]:
    """Arguments that each op takes."""
    offsets, expert = i(2, 6), {"x": f(4, 8), "w_gate_up": f(4, 12, 8), "w_down": f(4, 8, 6)}
    maps = {"row_map": plan().row_map, "source": plan().source}
    routed = {**expert, "weights": f(4, 2), **maps, "offsets": plan().offsets}
    gate = {"logits": f(4, 16), "k": 2}
    options = {"score_function": "sigmoid", "renormalize": True, "scaling_factor": 1.0}
    groups = {"num_groups": 1, "topk_groups": 1, "group_score_topk": 2}
    product = {"a": f(6, 8), "b": f(2, 8, 5), "offsets": offsets}
    outer = {"a": f(6, 8), "dc": f(6, 5), "offsets": offsets}
    scaled = {"a": fp8(6, 8), "a_scale": f(6, 1), "b": fp8(2, 5, 8), "b_scale": f(2, 1, 1)}
    attention = {"q": f(1, 2, 3, 4), "k": f(1, 1, 3, 4), "scale": 0.5}
    chunks = {"x": f(6, 3), "split_sizes": i(1, 2, 3), "order": i(2, 0, 1)}
    geometry = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
    clip = {"max_logits": f(2), "q_weight": f(12, 3), "k_weight": f(14, 3), **geometry}
    flags: dict[str, Any] = {"squares": f(2).double(), "pieces": [0, 2]}
    adamw = {name: [f(4, 6)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    bias = {"bias": f(16), "tokens_per_expert": i(*range(16)), "rate": 0.1}
    none = {"expert_bias": None, "valid": None, "select": "scores"}
    bins = {"bounds": torch.tensor([-1.0, 1.0])}
    loss = {
        "logits": f(4, 16), "tokens_per_expert": i([1] * 16), "sequence_tokens": i(4),
        "offsets": None, "valid": None, "top_k": 2, "score_function": "sigmoid", "coefficient": 0.1,
    }  # fmt: skip
    ranks = {"group": group(), "num_experts": 4, "hidden": 6, "max_tokens_per_rank": 8}
    parallel = kimi_ops.ExpertParallel(**ranks)
    sent = parallel.dispatch(f(4, 6), ids())
    floats = {"bias": None, "dtype": torch.float32}
    chain = {"coefficients": [3.4445, -4.775, 2.0315] * 5, "restarts": [3], "method": 2}
    return {
        "topk_gate": gate,
        "gate_plan": gate,
        "update_expert_bias_": bias,
        "sequence_balance_loss": {"logits": f(4, 16), "indices": ids()},
        "sequence_counts": {"indices": ids(), "num_experts": 16},
        "quantile_histogram_": {"histogram": i([0] * 5).expand(16, 5).clone(), **gate, **bins},
        "quantile_bias": {"histogram": i([1, 2], [2, 1]), "k": 1, **bins},
        "dense_gate": gate,
        "normalized_scores": {"logits": f(4, 16)},
        "expert_capacity": {"num_tokens": 4, "k": 2, "num_experts": 16, "factor": 1.25},
        "drop_to_capacity": {
            "weights": f(4, 2), "indices": ids(), "num_experts": 4, "capacity": 1
        },
        "z_loss": {"logits": f(4, 16)},
        "permute_plan": {"indices": ids(), "num_experts": 4},
        "permute": {"x": f(4, 6), "plan": plan()},
        "permute_weights": {"weights": f(4, 2), "plan": plan()},
        "unpermute": {"y": f(8, 6), "plan": plan()},
        "sort_chunks": chunks,
        "grouped_gemm": product,
        "grouped_gemm_wgrad": outer,
        "join_gate_up_": {"w1": f(2, 3, 4), "w3": f(2, 3, 4)},
        "fused_experts": {**expert, "weights": f(4, 2), "indices": ids()},
        "newton_schulz": {"g": f(4, 6)},
        "syrk": {"a": f(4, 6)},
        "symmetric_matmul": {"a": f(4, 4), "b": f(4, 4)},
        "eplb": {
            **{"weights": f(2, 12).abs(), "num_replicas": 16, "num_groups": 4},
            **{"num_nodes": 2, "num_gpus": 8},
        },
        "ExpertLoads": {"num_layers": 2, "num_experts": 4},
        "ExpertLoads.add": {
            **{"self": kimi_ops.ExpertLoads(2, 4), "layer": 0},
            "counts": i(1, 2, 3, 4),
        },
        "set_batch_invariant": {"enabled": kimi_ops.is_batch_invariant()},
        "replica_ids": {"indices": ids(), "placement": kimi_ops.eplb(f(2, 4).abs(), 6, 1, 1, 2)},
        "move_experts": {
            **{"tensors": [f(4, 2)], "old": i(0, 1, 2, 3), "new": i(3, 1, 2, 0)},
            "group": ranks["group"],
        },
        "ns_flops": {"shape": (4, 6)},
        "tune_ns_restarts": {"coefficients": [(3.4445, -4.775, 2.0315)] * 5},
        "attention_max_logits": attention,
        "qk_clip_": clip,
        "QKClip": {"layers": [layer()]},
        "MuonClip": {"params": [g(4, 6)]},
        "LocalWorld": {"size": 2},
        "ExpertParallel": ranks,
        "ExpertParallel.dispatch": {"self": parallel, "x": f(4, 6), "indices": ids()},
        "ExpertParallel.combine": {"self": parallel, "out": f(7, 6), "handle": sent.handle},
        "models.kimi_k2.KimiK2Config": {},
        "models.kimi_k2.KimiK2Config.from_dict": {"values": {}},
        "models.kimi_k2.RopeScaling": {"factor": 4.0},
        "muon_param_groups": {"model": nn.Linear(4, 4)},
        "Fp8BlockWeight": {"data": fp8(2, 5, 8), "scale": f(2, 1, 1)},
        "Fp8BlockWeight.quantize": {"weight": f(2, 5, 8)},
        "Int4GroupWeight": {"packed": torch.ones(2, 5, 1).int(), "scale": f(2, 5, 1).bfloat16()},
        "Int4GroupWeight.quantize": {"weight": f(2, 5, 8)},
        "Int4GroupWeight.empty": {"experts": 2, "rows": 5, "columns": 8},
        "Fp8Rows": {"data": fp8(6, 8), "scale": f(6, 1)},
        "Fp8Rows.quantize": {"x": f(6, 8)},
        "ops.topk_gate": {**gate, **options, **groups, **none},
        "ops.topk_gate_given": {"logits": f(4, 16), "ids": ids(), **options, "valid": None},
        "ops.gate_plan": {**gate, **options, **groups, **none},
        "ops.topk_gate_backward": {
            "grad_weights": f(4, 2), "logits": f(4, 16), "indices": ids(), **options
        },
        "ops.update_expert_bias_": {**bias, "centered": False},
        "ops.sequence_counts": {
            "indices": ids(), "num_experts": 16, "num_sequences": 2, "offsets": None, "valid": None
        },
        "ops.sequence_balance_loss": loss,
        "ops.sequence_balance_loss_backward": {"grad_loss": torch.ones(()), **loss},
        "ops.quantile_histogram_": {
            "histogram": i([0] * 5).expand(16, 5).clone(), "logits": f(4, 16), "cutoffs": f(4),
            **bins, "score_function": "sigmoid", "valid": None,
        },
        "ops.z_loss_backward": {
            "grad_loss": torch.ones(()), "logits": f(4, 16), "log_sum_exp": f(4),
            "valid_tokens": i(4), "coefficient": 0.1,
        },
        "ops.z_loss": {"logits": f(4, 16), "coefficient": 0.1, "valid": None},
        "ops.permute_plan": {"indices": ids(), "num_experts": 4, "align": 1},
        "ops.permute": {"x": f(4, 6), **maps},
        "ops.unpermute": {"y": f(8, 6), **maps, "weights": None},
        "ops.unpermute_backward": {"grad_x": f(4, 6), "y": f(8, 6), **maps, "weights": f(4, 2)},
        "ops.sort_chunks": {**chunks, "inverse": False},
        "ops.grouped_gemm": {**product, **floats, "starts": None},
        "ops.grouped_gemm_out": {
            **product, "bias": None, "out": f(6, 5), "accumulate": False, "starts": None
        },
        "ops.grouped_gemm_wgrad": {**outer, "dtype": torch.float32, "starts": None},
        "ops.grouped_gemm_wgrad_out": {
            **outer, "out": f(2, 8, 5), "accumulate": False, "starts": None
        },
        "ops.quantized_gemm": {
            "a": f(6, 8), "data": fp8(2, 5, 8), "scale": f(2, 1, 1), "offsets": offsets, **floats
        },
        "ops.fp8_rows": {"x": f(6, 8)},
        "ops.grouped_gemm_fp8": {**scaled, "offsets": offsets, **floats},
        "ops.grouped_gemm_fp8_out": {**scaled, "offsets": offsets, "bias": None, "out": f(6, 5)},
        "ops.fused_experts": {
            **routed, "gate_up_scale": None, "down_scale": None, "b_gate_up": None, "b_down": None,
            "activation": "silu", "numbers": [], "weights_first": False, "save": False,
        },
        "ops.fused_experts_backward": {
            "dy": f(4, 8), **routed, "gate_up": None, "b_gate_up": None, "b_down": None,
            "activation": "silu", "numbers": [], "wanted": [True] * 4 + [False] * 2,
        },
        "ops.matrix_product": {
            "a": f(4, 6), "b": f(6, 4), "c": None, "alpha": 1.0, "beta": 0.0, "symmetric": False
        },
        "ops.newton_schulz": {
            "g": [f(4, 6)], **chain, "dtype": torch.float32, "eps": 0.0, "aol": False
        },
        "ops.attention_max_logits": {**attention, "causal": True},
        "ops.clip_rows_": {
            "weights": [f(12, 3)], "max_logits": f(2), "layers": [2, 1],
            "geometry": [0, 2, 6, 0, 4, 2], "powers": [0.5], "tau": 100.0,
        },
        "ops.muon_momentum_": {
            "grads": [f(4, 6)], "buffers": [f(4, 6)], "momentum": 0.9, "nesterov": True,
            "maximize": False, **flags,
        },
        "ops.muon_update_": {
            "params": [f(4, 6)], "directions": [f(4, 6)], "rates": [0.1], "decay": 0.1,
            "cautious": False, **flags, "lr": None, "weight_decay": None,
        },
        "ops.adamw_": {
            **adamw, "steps": [f()], **rates, "maximize": False, "cautious": False, **flags,
            "measure": False, "scale": None, "lr_factor": None, "weight_decay_factor": None,
        },
        "ops.squares_": {
            "squares": f(1).double(), "x": [f(4, 6)], "pieces": [0, 1], "lengths": [24],
        },
        "ops.clip_factor": {"squares": f(2).double(), "pieces": [0, 2], "max_norm": 1.0},
    }  # fmt: skip


MODES = ("dual.", "twice.", "step.")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _call(case: str, arguments: dict[str, dict[str, Any]]) -> None:
    name, changes = case.split("(", 1)
    mode = next((mode for mode in MODES if name.startswith(mode)), "")
    name = name.removeprefix(mode)
    taken = {**arguments[name], **eval(f"dict({changes}", globals())}
    library = torch.ops.kimi_ops if name.startswith("ops.") else kimi_ops
    op = operator.attrgetter(name.removeprefix("ops."))(library)
    floats = (k for k, x in taken.items() if isinstance(x, Tensor) and x.is_floating_point())
    first = next(floats, "")
    if mode == "dual.":
        with forward_ad.dual_level():
            taken[first] = forward_ad.make_dual(taken[first], torch.ones_like(taken[first]))
            op(**taken)
    elif mode == "twice.":
        taken[first] = taken[first].detach().requires_grad_()
        loss = next(x for x in _tensors(op(**taken)) if x.requires_grad).square().sum()
        (gradient,) = torch.autograd.grad(loss, taken[first], create_graph=True)
        gradient.sum().backward()
    elif mode == "step.":
        op(**taken).step()
    else:
        op(**taken)


def say(case: str) -> str:
    """The error of a case and its text, or that it was taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _call(case, good())
        except Exception as error:
            text = re.sub(r"0x[0-9a-f]+", "0x..", str(error))
            return f"{type(error).__name__}: {text}"
    return "taken"
