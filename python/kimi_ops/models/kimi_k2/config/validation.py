# SPDX-License-Identifier: MIT
"""What the fields of a `KimiK2Config` must fulfil, checked when one is made."""

from collections.abc import Mapping
from typing import Any

from kimi_ops.models.kimi_k2.config.field_checks import check_int, check_number, check_tokens, error
from kimi_ops.models.kimi_k2.config.other_fields import check_others
from kimi_ops.models.kimi_k2.config.quantization import check_quantization
from kimi_ops.models.kimi_k2.config.rope_scaling import check_scaling

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
    "model_type": ("kimi_k2", "deepseek_v3"),
}
_SWITCHES = (
    "norm_topk_prob",
    "seq_aux",
    "rope_interleave",
    "attention_bias",
    "tie_word_embeddings",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MOST_EXPERTS, _MOST_CHOSEN = 1024, 32  # of topk_gate


def validate(values: Mapping[str, Any]) -> None:
    """Raise a TypeError or ValueError that names the first field that does not fit."""
    for name in _POSITIVE:
        check_int(name, values[name])
    for name in _NUMBERS:
        check_number(name, values[name])
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise error(name, f"one of {list(choices)}", values[name], "choose one")
    for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
        if not isinstance(values[name], int) or values[name] < 0:
            raise error(name, "an int >= 0", values[name], "correct it")
    for name in _SWITCHES:
        if not isinstance(values[name], bool):
            raise error(name, "a bool", values[name], "use true or false")
    for name in _TOKENS:
        check_tokens(name, values[name], values["vocab_size"], several=name == "eos_token_id")
    _validate_attention(values)
    _validate_router(values)
    check_quantization(values["quantization_config"])
    check_others(values["extra"])


def _validate_attention(values: Mapping[str, Any]) -> None:
    if values["q_lora_rank"] is not None:
        check_int("q_lora_rank", values["q_lora_rank"], " or None")
    heads, pairs = values["num_attention_heads"], values["num_key_value_heads"]
    if pairs != heads:
        raise error(
            "num_key_value_heads",
            f"num_attention_heads = {heads}",
            pairs,
            "latent attention has one key and value head for each query head",
        )
    if values["qk_rope_head_dim"] % 2:
        raise error(
            "qk_rope_head_dim", "an even number", values["qk_rope_head_dim"], "pairs rotate"
        )
    if values["attention_dropout"] != 0:
        raise error(
            "attention_dropout", "0", values["attention_dropout"], "K2 trains without dropout"
        )
    if values["rms_norm_eps"] <= 0:
        raise error("rms_norm_eps", "a number > 0", values["rms_norm_eps"], "use 1e-6")
    if values["rope_theta"] <= 1:
        raise error("rope_theta", "a number > 1", values["rope_theta"], "Kimi K2 has 50000")
    if values["rope_scaling"] is not None:
        check_scaling(values["rope_scaling"])


def _validate_router(values: Mapping[str, Any]) -> None:
    experts, groups = values["n_routed_experts"], values["n_group"]
    if values["routed_scaling_factor"] <= 0:
        raise error(
            "routed_scaling_factor",
            "a number > 0",
            values["routed_scaling_factor"],
            "1 scales nothing",
        )
    if values["aux_loss_alpha"] < 0:
        raise error(
            "aux_loss_alpha", "at least 0", values["aux_loss_alpha"], "0 turns the loss off"
        )
    for name, most in (("n_routed_experts", _MOST_EXPERTS), ("num_experts_per_tok", _MOST_CHOSEN)):
        if values[name] > most:
            raise error(name, f"at most {most}", values[name], "topk_gate takes no more")
    if experts % groups:
        raise error("n_group", f"a divisor of n_routed_experts = {experts}", groups, "change one")
    if values["topk_group"] > groups:
        raise error("topk_group", f"at most n_group = {groups}", values["topk_group"], "lower it")
    available = experts // groups * values["topk_group"]
    if available < values["num_experts_per_tok"] != experts:  # all of them need no choice
        raise error(
            "num_experts_per_tok",
            f"at most {available} selectable experts",
            values["num_experts_per_tok"],
            "lower it or add experts",
        )
