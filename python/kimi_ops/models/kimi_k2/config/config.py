# SPDX-License-Identifier: MIT
"""The shape of a Kimi K2 model, with the field names of its Hugging Face ``config.json``."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_ops.activations import ActivationName
from kimi_ops.models.kimi_k2.config import hf_json, presets
from kimi_ops.models.kimi_k2.config.rope_scaling import RopeScaling
from kimi_ops.models.kimi_k2.config.validation import validate

__all__ = ["KimiK2Config", "RopeScaling"]


@dataclass
class KimiK2Config:
    """Every number of a Kimi K2 architecture; the defaults are those of Kimi-K2-Base (July 2025).

    Fields carry the names of Hugging Face's ``config.json``. Sizes are numbers of elements,
    positions are tokens. The presets are `KimiK2Config.k2`, `moonlight`, `moonlight_slice`, `mini`
    and `tiny`.

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
    rope_interleave: bool = True
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    hidden_act: ActivationName = "silu"
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
    extra: dict[str, Any] = field(default_factory=dict)  # harmless keys of the file, kept as is

    @classmethod
    def k2(cls) -> "KimiK2Config":
        """Kimi-K2-Base, 1 026 408 232 448 parameters, 128K context."""
        return cls(**presets.K2)

    @classmethod
    def moonlight(cls) -> "KimiK2Config":
        """Moonlight-16B-A3B, 15 960 110 208 parameters, 8K context, K2's tokens and layers."""
        return cls(**presets.MOONLIGHT)

    @classmethod
    def moonlight_slice(cls) -> "KimiK2Config":
        """Moonlight's first 7 layers with its embedding and head: training fills 80 GB."""
        return dataclasses.replace(cls.moonlight(), num_hidden_layers=7)

    @classmethod
    def mini(cls) -> "KimiK2Config":
        """A byte-level K2 that learns on two CPU cores in minutes.

        `routed_scaling_factor` follows the rule that gives 2.827 for 8 of 384 experts: the mean of
        1 / |p| over random scores, p the renormalised sigmoids of the chosen ones; 4 of 32 give
        2.0.
        """
        return cls(**presets.MINI)

    @classmethod
    def tiny(cls) -> "KimiK2Config":
        """The smallest shape that uses every part, for tests."""
        return cls(**presets.TINY)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times what `rope_scaling` makes of it."""
        growth = 1.0 if self.rope_scaling is None else self.rope_scaling.softmax_growth
        return self.qk_head_dim**-0.5 * growth

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has experts instead of a dense MLP."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def __post_init__(self) -> None:
        validate(self._fields())

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that `from_dict` and Hugging Face engines read."""
        return hf_json.to_json(self._fields())

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, text_only: bool = False) -> "KimiK2Config":
        """Read the content of a Hugging Face ``config.json``, old and new spellings.

        ``rope_parameters`` and ``dtype`` (transformers 5) are understood beside ``rope_scaling``,
        ``rope_theta`` and ``torch_dtype``. Keys that are known to change nothing go to `extra`.
        Absent fields take the defaults of Kimi K2. Of a model that sees (``kimi_k25``) `text_only`
        takes the language model, ``text_config``.

        Raises
        ------
        TypeError, ValueError
            Not a mapping, a field with a value that no model can have, two spellings that say
            different things, or a key that may change the mathematics and is not served.
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        return cls(**hf_json.from_json(values, names, text_only=text_only))

    @classmethod
    def from_file(cls, path: str | Path, *, text_only: bool = False) -> "KimiK2Config":
        """Read a ``config.json``, as `from_dict` reads its content; a missing, broken or unfit file
        is a ValueError that names it."""
        path = Path(path)
        values = hf_json.read_object(path)
        try:
            return cls.from_dict(values, text_only=text_only)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} (in {path})") from None

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
