# SPDX-License-Identifier: MIT
"""Small parts: RMSNorm and the gated MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.recompute import Recomputes
from kimi_ops.nn import MLP as GatedMLP


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """Refuse parameters in a dtype that the ops do not compute in or a config cannot name."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"{op}: dtype: expected bfloat16, float16 or float32, got {dtype}; the gate computes "
            "in float32 at most: use one of these, model.float() for example"
        )


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to the dtype of x, then times the gain in the gain's dtype."""

    def __init__(self, size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **factory))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight * normed.to(x.dtype)


class MLP(Recomputes, GatedMLP):
    """The dense layers and the shared experts."""

    def __init__(self, config: KimiK2Config, intermediate_size: int, **factory: Any) -> None:
        super().__init__(config.hidden_size, intermediate_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.gated(x)
        with self.cheap():
            return self.down_proj(gated)
