# SPDX-License-Identifier: MIT
"""Passes over lists of tensors, at least one each (torch finds the kernels by the tensors)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.operators.registry import Operator


def _updates(grads: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [grad.new_empty(grad.shape, dtype=torch.float32) for grad in grads]


def _nothing(*_: Any) -> None:
    return None


def _sums(x: Sequence[Tensor]) -> Tensor:
    return x[0].new_empty((len(x),), dtype=torch.float64)


muon_momentum_ = Operator(
    "muon_momentum_(Tensor[] grads, Tensor(a!)[] buffers, float momentum, bool nesterov, "
    "bool maximize) -> Tensor[]",
    _updates,
)
muon_update_ = Operator(
    "muon_update_(Tensor(a!)[] params, Tensor[] directions, float[] rates, float decay, "
    "bool cautious) -> ()",
    _nothing,
)
adamw_ = Operator(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "int[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, bool cautious) -> ()",
    _nothing,
)
squares = Operator("squares(Tensor[] x) -> Tensor", _sums, differentiable=False)
