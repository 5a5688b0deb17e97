# SPDX-License-Identifier: MIT
"""The experts of every mixture-of-experts model of transformers, computed by this library.

    from kimi_ops.interop.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="kimi_ops")
    model.set_experts_implementation("kimi_ops")  # or later

Weights stay the model's own parameters, as they lie: checkpoints, optimizers and sharding see no
difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kimi_ops.activations import Activation, of, situ, swiglu
from kimi_ops.moe.fused_experts import fused_experts
from kimi_ops.moe.grouped_gemm import grouped_gemm
from kimi_ops.moe.permute import permute, permute_plan, unpermute
from kimi_ops.routing import as_int32

__all__ = ["NAME", "experts_forward", "register"]

NAME = "kimi_ops"


def register() -> None:
    """Make ``experts_implementation="kimi_ops"`` known to transformers. Again is no harm.

    Raises
    ------
    ImportError
        No transformers, or one whose models do not ask a registry for their experts.

    Examples
    --------
    >>> import transformers
    >>> from kimi_ops.interop.transformers import register
    >>> register()
    >>> config = transformers.MixtralConfig(
    ...     hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, vocab_size=64,
    ... )
    >>> model = transformers.MixtralForCausalLM(config)
    >>> model.set_experts_implementation("kimi_ops")
    """
    try:
        from transformers.integrations.moe import (
            ALL_EXPERTS_FUNCTIONS,
            _default_apply_gate,  # noqa: F401  (came with what `experts_forward` asks of a module)
        )
    except ImportError as error:
        raise ImportError(
            "kimi_ops.interop.transformers: register: expected a transformers with a registry of "
            f"experts' implementations (5.17 and later), got: {error}; pip install -U transformers"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of a module that transformers' `use_experts_implementation` decorates.

    ``y[t] = sum_k top_k_weights[t, k] * norm(down(gate(up(x[t]))))`` with the projections, biases,
    gate and norm of expert ``top_k_index[t, k]``. What `kimi_ops.activations` can say, with gate
    rows before up rows, runs as one `fused_experts`; any other as permuted rows through two
    `grouped_gemm`, the module's own gate between them.

    Parameters
    ----------
    experts : nn.Module
        Its `num_experts`, `has_gate`, `has_bias`, `is_transposed`, `is_concatenated` and
        `has_post_expert_norm` say what its parameters mean.
    hidden_states : Tensor [T, H]
    top_k_index : Tensor [T, K] int32 or int64
        Experts of each token; `num_experts` and above, or -1, is an expert of another rank: it adds
        nothing and its weight gets no gradient.
    top_k_weights : Tensor [T, K]

    Returns
    -------
    Tensor [T, H], the dtype of hidden_states
        Sums of slots in fp32, rounded once.
    """
    module: Any = experts
    count = module.num_experts
    ids = as_int32(top_k_index).int()  # of narrower types: -1 is none
    ids = torch.where(ids < count, ids, -1)
    x = hidden_states
    if not torch.is_autocast_enabled(x.device.type):  # else it decides
        x = x.to(module.down_proj.dtype)
    weights = top_k_weights.to(torch.promote_types(x.dtype, torch.float32))
    activation = _fused_activation(module)
    if activation is not None:
        y = fused_experts(
            x, module.gate_up_proj, module.down_proj, weights, ids, activation=activation,
            b_gate_up=module.gate_up_proj_bias if module.has_bias else None,
            b_down=module.down_proj_bias if module.has_bias else None,
        )  # fmt: skip
        return y.to(hidden_states.dtype)
    plan = permute_plan(ids, count)
    rows = _project(
        module, "gate_up_proj" if module.has_gate else "up_proj", permute(x, plan), plan
    )
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = _project(module, "down_proj", rows, plan)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    return unpermute(rows, plan, weights).to(hidden_states.dtype)


def _project(module: Any, name: str, rows: Tensor, plan: Any) -> Tensor:
    """Rows of each expert times its matrix, [in, out] if `is_transposed`, plus its bias."""
    matrices = getattr(module, name)
    if not module.is_transposed:
        matrices = matrices.transpose(1, 2)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return grouped_gemm(rows, matrices, plan.offsets, bias=bias)


def _fused_activation(module: Any) -> Activation | None:
    """The activation, where the module is what `fused_experts` computes."""
    from transformers.integrations.moe import _default_apply_gate

    laid_out = module.has_gate and module.is_concatenated
    if not laid_out or module.is_transposed or module.has_post_expert_norm:
        return None
    if type(module)._apply_gate is not _default_apply_gate:
        return _own_gate(module)
    name = _plain_name(module.act_fn)
    return None if name is None else of(name)


def _plain_name(function: Any) -> str | None:
    from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

    if isinstance(function, nn.SiLU | SiLUActivation):
        return "silu"
    if isinstance(function, GELUActivation):
        return "gelu"
    if isinstance(function, GELUTanh | NewGELUActivation):
        return "gelu_tanh"
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return None


# Gates of models' own that are the library's activations, by module and class; every one of them is
# held against the model's own by tests/interop.
_LIMITED = {
    "deepseek_v4:DeepseekV4Experts": "limit",
    "glm5_next:Glm5NextTextExperts": "swiglu_limit",
    "hy_v4:HYV4Experts": "swiglu_limit",
    "hy_v4_vl:HYV4VLExperts": "swiglu_limit",
}


def _own_gate(module: Any) -> Activation | None:
    place = type(module).__module__
    if not place.startswith("transformers.models."):
        return None
    key = f"{place.split('.')[2]}:{type(module).__name__}"
    if key in _LIMITED:
        silu = key != "deepseek_v4:DeepseekV4Experts" or _plain_name(module.act_fn) == "silu"
        return swiglu(getattr(module, _LIMITED[key])) if silu else None
    if key in ("inkling2:Inkling2Experts", "inkling2_loop:Inkling2LoopExperts"):
        caps = module.act_fn
        return situ(caps.gate_softcap.softcap, caps.up_softcap.softcap)
    if key == "minimax_m3_vl:MiniMaxM3VLExperts":
        return swiglu(module.swiglu_limit, alpha=module.swiglu_alpha, shift=1.0)
    return None
