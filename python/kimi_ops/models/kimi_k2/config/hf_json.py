# SPDX-License-Identifier: MIT
"""The fields of a `KimiK2Config` as Hugging Face's ``config.json`` spells them, old and new."""

import json
from pathlib import Path
from typing import Any

from kimi_ops.models.kimi_k2.config.nested import text_part
from kimi_ops.models.kimi_k2.config.rope_scaling import read_rope, write_scaling

__all__ = ["from_json", "read_object", "to_json"]

# other names of fields, in newer files or by transformers' attribute map
_ALIASES = {
    "dtype": "torch_dtype",
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
}


def to_json(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json``; a model that is not quantised has no key for it."""
    values = {name: value for name, value in fields.items() if name != "extra"}
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = write_scaling(values["rope_scaling"])
    if values["quantization_config"] is None:
        del values["quantization_config"]
    return {**fields["extra"], **values}


def from_json(values: dict[str, Any], names: set[str], *, text_only: bool) -> dict[str, Any]:
    """The fields of `names` that are there; the other keys as one field, `extra`. `text_only`
    takes the language model of one that sees."""
    if not isinstance(values, dict):
        raise TypeError(
            f"KimiK2Config: values: expected a dict, got {type(values).__name__}; pass the "
            "object that config.json holds"
        )
    values = dict(text_part(values, names | _ALIASES.keys(), text_only=text_only))
    for alias, name in _ALIASES.items():
        if alias in values:
            value = values.pop(alias)
            if values.setdefault(name, value) != value:
                raise ValueError(
                    f"KimiK2Config: {alias}: expected {name} = {values[name]!r} under its other "
                    f"name, got {value!r}; drop one of them"
                )
    values["rope_scaling"], theta = read_rope(values)
    if theta is not None:
        values["rope_theta"] = theta
    values.pop("rope_parameters", None)
    values.pop("original_max_position_embeddings", None)  # of the scaling
    if values.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = values.get("num_attention_heads", 64)
    if values.get("n_shared_experts", 0) is None:
        values["n_shared_experts"] = 0
    known = {key: value for key, value in values.items() if key in names}
    return {**known, "extra": {key: value for key, value in values.items() if key not in names}}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a missing or broken one is a ValueError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"KimiK2Config: path: expected a config.json, got {path}, which does not exist; "
            "pass the folder of a checkpoint"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"KimiK2Config: path: expected JSON, got {path} ({error}); restore the file"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"KimiK2Config: path: expected a JSON object, got {path}, which holds a "
            f"{type(values).__name__}; restore the file"
        )
    return values
