# SPDX-License-Identifier: MIT
from typing import Any

import torch
from torch import Tensor

from kimi_ops.operators.registry import Operator


def _largest(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty((q.shape[1],), dtype=torch.float32)


def _nothing(*_: Any) -> None:
    return None


attention_max_logits = Operator(
    "attention_max_logits(Tensor q, Tensor k, float scale, bool causal) -> Tensor", _largest
)
scale_rows_ = Operator(
    "scale_rows_(Tensor(a!) weight, Tensor factors, int first, int last) -> ()", _nothing
)
