# SPDX-License-Identifier: MIT
"""Router scores, top-k selection and load balancing."""

from typing import NamedTuple

from torch import Tensor

from kimi_ops.reference import topk_gate as reference


class TopkGate(NamedTuple):
    weights: Tensor
    indices: Tensor
    tokens_per_expert: Tensor


def topk_gate(logits: Tensor, k: int, **options) -> TopkGate:
    return TopkGate(*reference.topk_gate(logits, k, **options))


update_expert_bias_ = reference.update_expert_bias_
sequence_balance_loss = reference.sequence_balance_loss
z_loss = reference.z_loss
