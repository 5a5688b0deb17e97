# SPDX-License-Identifier: MIT
"""The gated MLP: a dense layer, or the experts that every token goes through."""

from typing import Any

from torch import Tensor, nn

from kimi_ops.activations import Activation, ActivationName
from kimi_ops.nn.checks import check_activation
from kimi_ops.reference.fused_experts import gated

__all__ = ["MLP"]


class MLP(nn.Module):
    """``down_proj(act(gate_proj(x), up_proj(x)))``, for example SwiGLU: three `torch.nn.Linear`.

    Parameters
    ----------
    hidden_size, intermediate_size : int
        H and F.
    activation : {"silu", "gelu", "gelu_tanh", "relu2", "situ"} or Activation
        Of `kimi_ops.activations`, with a gate.
    **factory
        ``device`` and ``dtype`` of the parameters.

    Raises
    ------
    ValueError
        Another activation.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.nn import MLP
    >>> MLP(8, 16)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    linear: type[nn.Linear] = nn.Linear  # of its layers

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: ActivationName | Activation = "silu",
        **factory: Any,
    ) -> None:
        super().__init__()
        self.activation = check_activation("MLP", activation, gated=True)
        self.gate_proj = self.linear(hidden_size, intermediate_size, bias=False, **factory)
        self.up_proj = self.linear(hidden_size, intermediate_size, bias=False, **factory)
        self.down_proj = self.linear(intermediate_size, hidden_size, bias=False, **factory)

    def gated(self, x: Tensor) -> Tensor:
        """[..., F], the input of `down_proj`."""
        return gated(self.gate_proj(x), self.up_proj(x), self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] from x [..., H]."""
        return self.down_proj(self.gated(x))
