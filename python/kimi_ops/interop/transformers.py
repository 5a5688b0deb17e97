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

from kimi_ops.moe.fused_experts import fused_experts
from kimi_ops.moe.grouped_gemm import grouped_gemm
from kimi_ops.moe.permute import permute, permute_plan, unpermute

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
    gate and norm of expert ``top_k_index[t, k]``. A gated SiLU or GELU without more runs as one
    `fused_experts`; any other as permuted rows through two `grouped_gemm`, the module's own gate
    between them.

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
    ids = top_k_index.to(torch.int32)
    ids = torch.where(ids < count, ids, -1)
    x = hidden_states
    if not torch.is_autocast_enabled(x.device.type):  # else it decides
        x = x.to(module.down_proj.dtype)
    weights = top_k_weights.to(torch.promote_types(x.dtype, torch.float32))
    activation = _fused_activation(module)
    if activation is not None:
        y = fused_experts(
            x, module.gate_up_proj, module.down_proj, weights, ids, activation=activation
        )
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


def _fused_activation(module: Any) -> str | None:
    """The name of the activation, where the module is what `fused_experts` computes."""
    from transformers.activations import GELUActivation, SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    plain = (
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and type(module)._apply_gate is _default_apply_gate
    )
    if not plain:
        return None
    if isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return "silu"
    exact = isinstance(module.act_fn, nn.GELU) and module.act_fn.approximate == "none"
    return "gelu" if exact or isinstance(module.act_fn, GELUActivation) else None
