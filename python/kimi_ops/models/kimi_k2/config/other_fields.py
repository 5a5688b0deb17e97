# SPDX-License-Identifier: MIT
"""Keys of a ``config.json`` that are no field of `KimiK2Config`: which are harmless.

A key that this file does not know may change what the model computes: it is refused.
"""

from collections.abc import Mapping
from typing import Any

from kimi_ops.models.kimi_k2.config.field_checks import error

__all__ = ["check_others"]

# What transformers writes into every file, none of it read by a forward.
_HARMLESS = """
    add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
    prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers_version typical_p unk_token_id use_bfloat16
    head_dim qk_head_dim
"""  # the last two follow from other fields, whatever is written

# Switches of mathematics that no Kimi K2 has: harmless where they are off.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "max_window_layers": (None,),
    "swiglu_limit": (None,),
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logit_scale": (1, None),
    "index_topk": (None,),
    "hidden_dropout": (0, None),
    "hidden_dropout_prob": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "attn_factor": (1, None),
    "clip_qkv": (None,),
}


def check_others(values: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first key which may change the mathematics."""
    for name, value in values.items():
        if name in _HARMLESS.split() or name.startswith("_"):
            continue
        if name == "layer_types":
            others = sorted({str(kind) for kind in value or ()} - {"full_attention"})
            if others:
                raise error(name, "full_attention in every layer", others, "no other is served")
        elif name not in _OFF:
            raise error(
                name,
                "only fields that this model knows",
                value,
                "it may change what the model computes; remove it if it does not",
            )
        elif value not in _OFF[name]:
            raise error(name, f"{_OFF[name][0]!r} or no such field", value, "it is not served")
