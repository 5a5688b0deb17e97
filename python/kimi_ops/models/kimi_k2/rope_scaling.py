# SPDX-License-Identifier: MIT
"""Rotary positions beyond the window of the pretraining: YaRN's numbers, read and checked."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kimi_ops.models.kimi_k2.field_checks import check_int, check_number, error

__all__ = ["RopeScaling", "check_scaling", "read_scaling"]


@dataclass(frozen=True)
class RopeScaling:
    """YaRN: the pretraining window `original_max_position_embeddings` stretched by `factor`.

    Rotary pairs that turn more than `beta_fast` times in the original window keep their frequency,
    those that turn less than `beta_slow` times are slowed by `factor`, a ramp between. `mscale` and
    `mscale_all_dim` raise the attention temperature (`KimiK2Config.softmax_scale`).
    """

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale: float) -> float:
        """0.1 * mscale * ln(factor) + 1, YaRN's growth of the logits; 1 without stretching."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def check_scaling(scaling: object) -> None:
    """Raise a TypeError or ValueError that names the first number that does not fit."""
    if not isinstance(scaling, RopeScaling):
        raise TypeError(
            "KimiK2Config: rope_scaling: expected a RopeScaling or None, got "
            f"{type(scaling).__name__}; use RopeScaling(factor=...), or KimiK2Config.from_dict for "
            "the content of a config.json"
        )
    for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        check_number(f"rope_scaling.{name}", getattr(scaling, name))
    window = scaling.original_max_position_embeddings
    check_int("rope_scaling.original_max_position_embeddings", window)
    for name in ("beta_fast", "beta_slow"):
        if getattr(scaling, name) <= 0:
            raise error(f"rope_scaling.{name}", "a number > 0", getattr(scaling, name), "raise it")
    if scaling.factor < 1:
        raise error("rope_scaling", "factor >= 1", scaling.factor, "YaRN only stretches")


def read_scaling(values: Any) -> RopeScaling | None:
    """The content of a ``rope_scaling`` or ``rope_parameters``; None for plain rotary positions."""
    if values is None or isinstance(values, RopeScaling):
        return values
    if not isinstance(values, dict):
        raise TypeError(
            f"KimiK2Config: rope_scaling: expected a dict or null, got {type(values).__name__}; "
            "use null for plain rotary positions"
        )
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(
            f"KimiK2Config: rope_scaling: expected type yarn, got {kind!r}; use yarn or null"
        )
    names = {f.name for f in dataclasses.fields(RopeScaling)}
    known = {k: v for k, v in values.items() if k in names and v is not None}
    if "factor" not in known:
        raise ValueError("KimiK2Config: rope_scaling: expected a factor, got none; add it")
    return RopeScaling(**known)
