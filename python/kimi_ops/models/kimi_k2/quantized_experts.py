# SPDX-License-Identifier: MIT
"""Routed experts that stay in the form of the checkpoint: FP8 blocks or INT4 groups, read only."""

from typing import Any

from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.layers import FixedBuffers
from kimi_ops.moe.quantized import Fp8BlockWeight, Int4GroupWeight, QuantizedWeight

# form -> class, and the name in a checkpoint of each of its tensors
FORMS: dict[str, tuple[type[QuantizedWeight], dict[str, str]]] = {
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

    def __init__(self, config: KimiK2Config, experts: int, form: str, **factory: Any) -> None:
        super().__init__()
        self.form = form
        kind, names = FORMS[form]
        hidden, width = config.hidden_size, config.moe_intermediate_size
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
        kind, names = FORMS[self.form]
        return kind(**{part: getattr(self, f"{stack}_{name}") for part, name in names.items()})
