# SPDX-License-Identifier: MIT
"""What a `KimiK2Config` must fulfil, checked when one is made."""

import math

from kimi_ops.models.kimi_k2.config import KimiK2Config, RopeScaling

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
_NUMBERS = (
    "routed_scaling_factor",
    "aux_loss_alpha",
    "rope_theta",
    "rms_norm_eps",
    "attention_dropout",
    "initializer_range",
)
_CHOICES = {
    "scoring_func": ("sigmoid", "softmax", "sqrtsoftplus"),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "torch_dtype": ("bfloat16", "float16", "float32", None),
}


def _error(field: str, expected: str, came: object, mend: str) -> ValueError:
    return ValueError(f"KimiK2Config: {field}: expected {expected}, got {came!r}; {mend}")


def _check_int(field: str, value: object, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"KimiK2Config: {field}: expected an int{alternative}, got {type(value).__name__}; "
            "pass a number"
        )
    if value < 1:
        raise _error(field, f"at least 1{alternative}", value, "raise it")


def _check_number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"KimiK2Config: {field}: expected a number, got {type(value).__name__}; pass a number"
        )
    if not math.isfinite(value):
        raise _error(field, "a finite number", value, "correct it")


def validate(config: KimiK2Config) -> None:
    """Raise a TypeError or ValueError that names the first field that does not fit."""
    for name in _POSITIVE:
        _check_int(name, getattr(config, name))
    for name in _NUMBERS:
        _check_number(name, getattr(config, name))
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise _error(name, f"one of {list(choices)}", getattr(config, name), "choose one")
    for name in ("n_shared_experts", "first_k_dense_replace"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 0:
            raise _error(name, "an int >= 0", getattr(config, name), "correct it")
    _validate_attention(config)
    _validate_router(config)


def _validate_attention(config: KimiK2Config) -> None:
    if config.q_lora_rank is not None:
        _check_int("q_lora_rank", config.q_lora_rank, " or None")
    if config.num_key_value_heads != config.num_attention_heads:
        raise _error(
            "num_key_value_heads",
            f"num_attention_heads = {config.num_attention_heads}",
            config.num_key_value_heads,
            "latent attention has one key and value head for each query head",
        )
    if config.qk_rope_head_dim % 2:
        raise _error("qk_rope_head_dim", "an even number", config.qk_rope_head_dim, "pairs rotate")
    if config.attention_dropout != 0:
        raise _error(
            "attention_dropout", "0", config.attention_dropout, "K2 trains without dropout"
        )
    if config.rms_norm_eps <= 0:
        raise _error("rms_norm_eps", "a number > 0", config.rms_norm_eps, "use 1e-6")
    if config.rope_theta <= 1:
        raise _error("rope_theta", "a number > 1", config.rope_theta, "Kimi K2 has 50000")
    if config.rope_scaling is not None:
        _validate_scaling(config.rope_scaling)


def _validate_scaling(scaling: RopeScaling) -> None:
    if not isinstance(scaling, RopeScaling):
        raise TypeError(
            "KimiK2Config: rope_scaling: expected a RopeScaling or None, got "
            f"{type(scaling).__name__}; use RopeScaling(factor=...), or KimiK2Config.from_dict for "
            "the content of a config.json"
        )
    for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        _check_number(f"rope_scaling.{name}", getattr(scaling, name))
    window = scaling.original_max_position_embeddings
    _check_int("rope_scaling.original_max_position_embeddings", window)
    for name in ("beta_fast", "beta_slow"):
        if getattr(scaling, name) <= 0:
            raise _error(f"rope_scaling.{name}", "a number > 0", getattr(scaling, name), "raise it")
    if scaling.factor < 1:
        raise _error("rope_scaling", "factor >= 1", scaling.factor, "YaRN only stretches")


def _validate_router(config: KimiK2Config) -> None:
    experts, groups = config.n_routed_experts, config.n_group
    if config.routed_scaling_factor <= 0:
        raise _error(
            "routed_scaling_factor",
            "a number > 0",
            config.routed_scaling_factor,
            "1 scales nothing",
        )
    if config.aux_loss_alpha < 0:
        raise _error("aux_loss_alpha", "at least 0", config.aux_loss_alpha, "0 turns the loss off")
    if experts % groups:
        raise _error("n_group", f"a divisor of n_routed_experts = {experts}", groups, "change one")
    if config.topk_group > groups:
        raise _error("topk_group", f"at most n_group = {groups}", config.topk_group, "lower it")
    available = experts // groups * config.topk_group
    if config.num_experts_per_tok > available:
        raise _error(
            "num_experts_per_tok",
            f"at most {available} selectable experts",
            config.num_experts_per_tok,
            "lower it or add experts",
        )
