# SPDX-License-Identifier: MIT
"""What several layers check."""

from kimi_ops import _check
from kimi_ops.activations import Activation, ActivationName, of
from kimi_ops.reference.fused_experts import ACTIVATIONS

Activated = ActivationName | Activation


def check_activation(op: str, activation: Activated, *, gated: bool = False) -> Activated:
    """An activation as it came, or a ValueError; `gated`: one that has a gate."""
    form = of(activation)
    _check.choice(op, "activation", form.name, tuple(ACTIVATIONS))
    if gated and not form.gated:
        raise ValueError(
            f"{op}: activation: expected one with a gate, got {form}; without a gate two "
            "torch.nn.Linear do it"
        )
    return activation
