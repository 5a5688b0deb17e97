# SPDX-License-Identifier: MIT
"""Routed experts that stay in the form of the checkpoint: FP8 blocks or INT4 groups, read only."""

from typing import TYPE_CHECKING, Any

import torch

from kimi_ops.formats import FP8_BLOCK, INT4_WORD
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.layers import FixedBuffers
from kimi_ops.moe.quantized import Fp8BlockWeight, Int4GroupWeight, QuantizedWeight

if TYPE_CHECKING:
    from kimi_ops.models.kimi_k2.model import KimiK2

# form -> class, and the name in a checkpoint of each of its tensors
_FORMS: dict[str, tuple[type[QuantizedWeight], dict[str, str]]] = {
    "fp8": (Fp8BlockWeight, {"data": "weight", "scale": "weight_scale_inv"}),
    "int4": (Int4GroupWeight, {"packed": "weight_packed", "scale": "weight_scale"}),
}


class QuantizedExperts(FixedBuffers):
    """The stacks of `Experts` as buffers: no optimizer sees them and no cast changes them.

    Attributes
    ----------
    form : {"fp8", "int4"}
    gate_up_proj, down_proj : Fp8BlockWeight or Int4GroupWeight
        [E, 2F, H] with gate rows before up rows, and [E, H, F]. Their tensors are the buffers
        ``gate_up_weight``, ``gate_up_weight_scale_inv`` and so on, named as in a checkpoint.
    """

    def __init__(self, config: KimiK2Config, form: str, **factory: Any) -> None:
        super().__init__()
        self.form = form
        kind, names = _FORMS[form]
        experts, hidden = config.n_routed_experts, config.hidden_size
        width = config.moe_intermediate_size
        for stack, shape in {"gate_up": (2 * width, hidden), "down": (hidden, width)}.items():
            weight = kind.empty(experts, *shape, device=factory.get("device") or "cpu")
            for part, tensor in weight.tensors().items():
                self.register_buffer(f"{stack}_{names[part]}", tensor)

    @property
    def gate_up_proj(self) -> QuantizedWeight:
        return self._weight("gate_up")

    @property
    def down_proj(self) -> QuantizedWeight:
        return self._weight("down")

    def _weight(self, stack: str) -> QuantizedWeight:
        kind, names = _FORMS[self.form]
        return kind(**{part: getattr(self, f"{stack}_{name}") for part, name in names.items()})


def keep_quantized(model: "KimiK2", form: str) -> None:
    """Give a model on the meta device experts of `form` instead of plain ones."""
    op, config = "from_pretrained", model.config
    if form not in _FORMS:
        raise ValueError(
            f"{op}: experts: expected one of {sorted(_FORMS)} or None, got {form!r}; choose one"
        )
    width, hidden = config.moe_intermediate_size, config.hidden_size
    if form == "fp8" and width % FP8_BLOCK:
        raise ValueError(
            f"{op}: experts: expected moe_intermediate_size as a multiple of {FP8_BLOCK} beside "
            f"'fp8', since gate and up share a grid of scales, got {width}; use experts=None"
        )
    if form == "int4" and (width % INT4_WORD or hidden % INT4_WORD):
        raise ValueError(
            f"{op}: experts: expected hidden_size and moe_intermediate_size as multiples of "
            f"{INT4_WORD} beside 'int4', got {hidden} and {width}; use experts=None"
        )
    for moe in model.moe_layers():
        moe.experts = QuantizedExperts(config, form, device=torch.device("meta"))
