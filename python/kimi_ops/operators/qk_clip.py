# SPDX-License-Identifier: MIT
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.operators.registry import Operator


def _largest(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty((q.shape[1],), dtype=torch.float32)


def _gamma(weights: Sequence[Tensor], max_logits: Tensor, *_: Any) -> Tensor:
    return max_logits.new_empty(max_logits.shape)


attention_max_logits = Operator(
    "attention_max_logits(Tensor q, Tensor k, float scale, bool causal) -> Tensor", _largest
)
clip_rows_ = Operator(
    "clip_rows_(Tensor(a!)[] weights, Tensor max_logits, int[] layers, int[] geometry, "
    "float[] powers, float tau) -> Tensor",
    _gamma,
)
