# SPDX-License-Identifier: MIT
"""The fields in which the presets of `KimiK2Config` differ from its defaults."""

from typing import Any

from kimi_ops.models.kimi_k2.config.rope_scaling import RopeScaling

NAMES = ("k2", "moonlight", "moonlight_slice", "mini", "tiny")  # methods of KimiK2Config

K2: dict[str, Any] = dict(
    rope_scaling=RopeScaling(
        factor=32.0,
        original_max_position_embeddings=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
)

MOONLIGHT: dict[str, Any] = dict(
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    routed_scaling_factor=2.446,
    q_lora_rank=None,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)

MINI: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=32,
    num_experts_per_tok=4,
    routed_scaling_factor=1.996,
    q_lora_rank=64,
    kv_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    rope_scaling=RopeScaling(
        factor=4.0,
        original_max_position_embeddings=256,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    max_position_embeddings=1024,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    torch_dtype="float32",
)

TINY: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    rope_scaling=RopeScaling(
        factor=4.0,
        original_max_position_embeddings=32,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    torch_dtype="float32",
)
