# SPDX-License-Identifier: MIT
"""The fields of a `KimiK2Config` as Hugging Face's ``config.json`` spells them, old and new."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kimi_ops.models.kimi_k2.rope_scaling import read_scaling

__all__ = ["from_json", "read_object", "to_json"]


def to_json(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json``; a model that is not quantised has no key for it."""
    values = {name: value for name, value in fields.items() if name != "extra"}
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(values["rope_scaling"])}
    if values["quantization_config"] is None:
        del values["quantization_config"]
    return {**fields["extra"], **values}


def from_json(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The fields of `names` that are there; the other keys as one field, `extra`."""
    if not isinstance(values, dict):
        raise TypeError(
            f"KimiK2Config: values: expected a dict, got {type(values).__name__}; pass the "
            "object that config.json holds"
        )
    values = dict(values)
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        if not isinstance(rope, dict):
            raise TypeError(
                "KimiK2Config: rope_parameters: expected a dict or null, got "
                f"{type(rope).__name__}; pass the object that config.json holds"
            )
        values.setdefault("rope_scaling", rope)
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 50000.0))
    if "dtype" in values:
        values.setdefault("torch_dtype", values.pop("dtype"))
    if "num_mtp_layers" in values:
        values.setdefault("num_nextn_predict_layers", values.pop("num_mtp_layers"))
    values["rope_scaling"] = read_scaling(values.get("rope_scaling"))
    known = {key: value for key, value in values.items() if key in names}
    return {**known, "extra": {key: value for key, value in values.items() if key not in names}}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a missing or broken one is a ValueError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
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
