# SPDX-License-Identifier: MIT
"""Passes over lists of tensors, at least one each (torch finds the kernels by the tensors)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from kimi_ops.operators.registry import Operator


def _updates(grads: Sequence[Tensor], *_: Any) -> Tensor:
    return grads[0].new_empty((sum(grad.numel() for grad in grads),), dtype=torch.float32)


def unpacked(updates: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """The updates that `muon_momentum_` gives as one tensor, as views in the gradients' shapes."""
    return list(_unflatten_dense_tensors(updates, grads))


def _nothing(*_: Any) -> None:
    return None


def _factor(squares: Tensor, *_: Any) -> Tensor:
    return squares.new_empty((), dtype=torch.float32)


muon_momentum_ = Operator(
    "muon_momentum_(Tensor[] grads, Tensor(a!)[] buffers, float momentum, bool nesterov, "
    "bool maximize, Tensor? squares, int[] pieces) -> Tensor",
    _updates,
)
muon_update_ = Operator(
    "muon_update_(Tensor(a!)[] params, Tensor[] directions, float[] rates, float decay, "
    "bool cautious, Tensor? squares, int[] pieces, Tensor? lr, Tensor? weight_decay) -> ()",
    _nothing,
)
adamw_ = Operator(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, bool cautious, Tensor(e!)? squares, int[] pieces, bool measure, "
    "Tensor? scale, Tensor? lr_factor, Tensor? weight_decay_factor) -> ()",
    _nothing,
)
squares_ = Operator(
    "squares_(Tensor(a!) squares, Tensor[] x, int[] pieces, int[] lengths) -> ()", _nothing
)
clip_factor = Operator(
    "clip_factor(Tensor squares, int[] pieces, float max_norm) -> Tensor",
    _factor,
    differentiable=False,
)
