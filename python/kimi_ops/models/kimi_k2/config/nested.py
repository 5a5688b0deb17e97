# SPDX-License-Identifier: MIT
"""The ``config.json`` of a model that sees (Kimi K2.5 and later): a language model, and beside it a
vision tower, which is not built here."""

from collections.abc import Collection
from typing import Any

from kimi_ops.models.kimi_k2.config.field_checks import error
from kimi_ops.models.kimi_k2.config.other_fields import check_others

__all__ = ["text_part"]

_MODELS = ("kimi_k25",)
# What the language model has nothing to do with.
_OF_VISION = """
    vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id
    media_placeholder_token_id ignore_index use_unified_vision_chunk video_placeholder
    projection_hidden_size projection_layer_norm_eps
"""
# Which ids begin, end and fill a text is said for the whole model.
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id")


def text_part(values: dict[str, Any], names: Collection[str], *, text_only: bool) -> dict[str, Any]:
    """The fields of the language model; a ValueError where they are not all and not `text_only`.

    `names` are its fields. Those beside ``text_config`` count where that has none, and must not
    contradict it; the ids of tokens count before its own.
    """
    text, model = values.get("text_config"), values.get("model_type")
    if text is None:
        return values
    if not text_only:
        raise ValueError(
            "KimiK2Config: text_config: expected a language model alone, got the one within "
            f"model_type {model!r}; text_only=True takes it and leaves the vision tower out: "
            "KimiK2.from_pretrained(folder, text_only=True), kimi-ops chat --text-only"
        )
    if model not in _MODELS:
        raise error("model_type", f"one of {list(_MODELS)} beside text_config", model, "choose one")
    if not isinstance(text, dict):
        raise error("text_config", "a dict", text, "restore the file")
    text, others = dict(text), {}
    for name, value in values.items():
        if name in ("text_config", "model_type", "architectures", *_OF_VISION.split()):
            continue
        if name not in names:
            others[name] = value
        elif name in _OF_THE_WHOLE:
            text[name] = text.get(name) if value is None else value
        elif text.setdefault(name, value) != value:
            raise error(name, f"{text[name]!r}, as text_config says", value, "drop one of them")
    check_others(others)
    return text
