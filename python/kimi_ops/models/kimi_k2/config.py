# SPDX-License-Identifier: MIT
"""The shape of a Kimi K2 model, with the field names of its Hugging Face ``config.json``."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["KimiK2Config", "RopeScaling"]


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


@dataclass
class KimiK2Config:
    """Every number of a Kimi K2 architecture; the defaults are those of Kimi-K2-Base (July 2025).

    Fields carry the names of Hugging Face's ``config.json``. Sizes are numbers of elements,
    positions are tokens. `KimiK2Config.k2`, `mini` and `tiny` are the presets.

    Raises
    ------
    ValueError
        A combination that no model can have; the message names the field.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.config import KimiK2Config
    >>> config = KimiK2Config.k2()
    >>> config.n_routed_experts, config.num_experts_per_tok, round(config.softmax_scale, 8)
    (384, 8, 0.1308608)
    """

    vocab_size: int = 163840
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 64
    num_key_value_heads: int = 64
    n_routed_experts: int = 384
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    routed_scaling_factor: float = 2.827
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 50000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    bos_token_id: int | None = 163584
    eos_token_id: int | list[int] | None = 163585
    pad_token_id: int | None = 163839
    torch_dtype: str | None = "bfloat16"
    use_cache: bool = True
    pretraining_tp: int = 1
    ep_size: int = 1
    model_type: str = "kimi_k2"
    architectures: list[str] = field(default_factory=lambda: ["DeepseekV3ForCausalLM"])
    quantization_config: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # other keys of the file, kept as they are

    @classmethod
    def k2(cls) -> "KimiK2Config":
        """Kimi-K2-Base, 1 026 408 232 448 parameters, 128K context."""
        return cls(
            rope_scaling=RopeScaling(
                factor=32.0,
                original_max_position_embeddings=4096,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            )
        )

    @classmethod
    def mini(cls) -> "KimiK2Config":
        """A byte-level K2 that learns on two CPU cores in minutes.

        `routed_scaling_factor` follows the rule that gives 2.827 for 8 of 384 experts: the mean of
        1 / |p| over random scores, p the renormalised sigmoids of the chosen ones; 4 of 32 give
        2.0.
        """
        return cls(
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

    @classmethod
    def tiny(cls) -> "KimiK2Config":
        """The smallest shape that uses every part, for tests."""
        return cls(
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

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's magnitude squared: q and k both grow by it."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is None or self.rope_scaling.mscale_all_dim == 0:
            return scale
        return scale * self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim) ** 2

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has experts instead of a dense MLP."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def __post_init__(self) -> None:
        from kimi_ops.models.kimi_k2.validation import validate

        validate(self)

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that `from_dict` and Hugging Face engines read."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = values.pop("extra")
        if self.rope_scaling is not None:
            values["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(self.rope_scaling)}
        if self.quantization_config is None:
            del values["quantization_config"]
        return {**extra, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KimiK2Config":
        """Read the content of a Hugging Face ``config.json``, old and new spellings.

        ``rope_parameters`` and ``dtype`` (transformers 5) are understood beside ``rope_scaling``,
        ``rope_theta`` and ``torch_dtype``. Keys that are no field go to `extra`. Absent fields take
        the defaults of Kimi K2.

        Raises
        ------
        TypeError, ValueError
            Not a mapping, or a field with a value that no model can have.
        """
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
        values["rope_scaling"] = _rope_scaling(values.get("rope_scaling"))
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in names}
        known = {key: value for key, value in values.items() if key in names}
        return cls(**known, extra=extra)

    @classmethod
    def from_file(cls, path: str | Path) -> "KimiK2Config":
        """Read a ``config.json``; a missing, broken or unfit file is a ValueError that names it."""
        path = Path(path)
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
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} (in {path})") from None


def _rope_scaling(values: Any) -> RopeScaling | None:
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
