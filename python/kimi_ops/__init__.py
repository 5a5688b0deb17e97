# SPDX-License-Identifier: MIT
"""Kernels of a Kimi-K2-class mixture-of-experts model as drop-in PyTorch ops."""

from kimi_ops.topk_gate import (
    TopkGate,
    sequence_balance_loss,
    topk_gate,
    update_expert_bias_,
    z_loss,
)

__all__ = ["TopkGate", "sequence_balance_loss", "topk_gate", "update_expert_bias_", "z_loss"]
