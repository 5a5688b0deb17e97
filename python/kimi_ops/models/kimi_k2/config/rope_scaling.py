# SPDX-License-Identifier: MIT
"""Rotary positions beyond the window of the pretraining: how they stretch, read and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_ops.models.kimi_k2.config.field_checks import check_int, check_number, error

__all__ = ["RopeScaling", "check_scaling", "read_rope", "write_scaling"]

# rope_type -> the numbers that it has; transformers' DeepseekV3 serves the same ones
_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
}
_OPTIONAL = ("mscale", "mscale_all_dim", "attention_factor")
# numbers that other engines multiply with: refused unless they change nothing
_WITHOUT_EFFECT = {"attn_factor": 1, "partial_rotary_factor": 1, "extrapolation_factor": 1}
_HARMLESS = ("type", "rope_type", "rope_theta", "finetuned")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions stretch from the window of the pretraining to a longer one.

    Parameters
    ----------
    factor : float
        Of the stretch.
    original_max_position_embeddings : int
        The window of the pretraining.
    beta_fast, beta_slow : float
        YaRN: pairs that turn more than `beta_fast` times in that window keep their frequency, those
        that turn less than `beta_slow` times are slowed by `factor`, a ramp between.
    mscale, mscale_all_dim : float, optional
        YaRN: the attention temperature grows with them, see `growth` and `softmax_growth`.
    rope_type : {"yarn", "linear", "dynamic", "llama3"}
        linear slows all pairs by `factor`. dynamic changes nothing within
        `max_position_embeddings`, beyond which this model takes no tokens. llama3 slows pairs of
        long waves, with a ramp between the two `freq_factor`.
    attention_factor : float, optional
        YaRN: in place of the growth that `mscale` and `mscale_all_dim` make.
    truncate : bool
        YaRN: round the ends of the ramp to whole pairs.
    low_freq_factor, high_freq_factor : float, optional
        llama3: waves longer than window / low are slowed, those shorter than window / high kept.
    """

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    rope_type: str = "yarn"
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    @property
    def growth(self) -> float:
        """What cos and sin are multiplied with."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_growth(self) -> float:
        """What the scale of the softmax is multiplied with: q and k both grow by its root."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _magnitude(self, mscale: float) -> float:
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
    if scaling.rope_type not in _NUMBERS:
        kinds = [*_NUMBERS, "default"]
        raise error("rope_scaling.rope_type", f"one of {kinds}", scaling.rope_type, "use yarn")
    for name in _NUMBERS[scaling.rope_type]:
        field, value = f"rope_scaling.{name}", getattr(scaling, name)
        if name == "truncate":
            if not isinstance(value, bool):
                raise TypeError(
                    f"KimiK2Config: {field}: expected a bool, got {type(value).__name__}; "
                    "use true or false"
                )
        elif name == "original_max_position_embeddings":
            check_int(field, value)
        elif value is not None or name not in _OPTIONAL:
            check_number(field, value)
            if value <= 0 and name not in ("mscale", "mscale_all_dim"):
                raise error(field, "a number > 0", value, "raise it")
    if scaling.factor < 1:
        raise error("rope_scaling", "factor >= 1", scaling.factor, "positions only stretch")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.rope_type == "llama3" and low is not None and high is not None and low >= high:
        raise error("rope_scaling.low_freq_factor", f"below high_freq_factor = {high}", low, "swap")


def read_rope(values: Mapping[str, Any]) -> tuple[RopeScaling | None, float | None]:
    """(scaling, rope_theta) of a ``config.json`` in any of its spellings; None where absent.

    ``rope_scaling`` beside ``rope_theta`` is the old one, ``rope_parameters`` with both that of
    transformers 5; null and {} are absent.
    """
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = values.get(key)
        if isinstance(value, RopeScaling):
            return value, values.get("rope_theta")
        if value is not None and not isinstance(value, dict):
            raise TypeError(
                f"KimiK2Config: {key}: expected a dict or null, got {type(value).__name__}; "
                "use null for plain rotary positions"
            )
        if value:
            found[key] = value
    thetas = [values.get("rope_theta"), *(rope.get("rope_theta") for rope in found.values())]
    scalings = [_scaling(key, rope, values) for key, rope in found.items()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise error("rope_scaling", "what rope_parameters says", found["rope_scaling"], "drop one")
    given = [theta for theta in thetas if theta is not None]
    if any(theta != given[0] for theta in given):
        raise error("rope_theta", "one value beside rope_parameters", given, "drop one")
    return (scalings[0] if scalings else None), (given[0] if given else None)


def _scaling(key: str, rope: dict[str, Any], values: Mapping[str, Any]) -> RopeScaling | None:
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"KimiK2Config: {key}: expected one kind of rotary positions for all layers, got "
            f"parameters for {', '.join(nested)}; give those of the model's attention alone"
        )
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    kind = kinds[0] if kinds else "default"
    if any(other != kind for other in kinds):
        raise error(f"{key}.type", f"rope_type = {kind!r}", kinds[1], "drop one of them")
    if kind != "default" and kind not in _NUMBERS:
        raise error(f"{key}.rope_type", f"one of {[*_NUMBERS, 'default']}", kind, "use one of them")
    numbers = _NUMBERS.get(kind, ())
    for name, value in rope.items():
        neutral = value is None or value == _WITHOUT_EFFECT.get(name, ...)
        if name not in (*numbers, *_HARMLESS) and not neutral:
            raise error(
                f"{key}.{name}", f"only {[*numbers]} beside type {kind!r}", value, "remove it"
            )
    if kind == "default":
        return None
    known = {name: rope[name] for name in numbers if rope.get(name) is not None}
    if "original_max_position_embeddings" in numbers:
        longest = values.get("max_position_embeddings", 131072)
        inside = known.get("original_max_position_embeddings", longest)
        window = values.get("original_max_position_embeddings", inside)
        known["original_max_position_embeddings"] = window
        if "factor" not in known and "factor" in rope:  # null: what the two lengths say
            check_int("max_position_embeddings", longest)
            check_int(f"{key}.original_max_position_embeddings", window)
            known["factor"] = longest / window
    if "factor" not in known:
        raise ValueError(f"KimiK2Config: {key}: expected a factor, got none; add it")
    return RopeScaling(**known, rope_type=kind)


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The content of a ``rope_scaling``."""
    numbers = {name: getattr(scaling, name) for name in _NUMBERS[scaling.rope_type]}
    given = {name: value for name, value in numbers.items() if value is not None}
    if given.get("truncate") is True:
        del given["truncate"]
    return {"type": scaling.rope_type, **given}
