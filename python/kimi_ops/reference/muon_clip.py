# SPDX-License-Identifier: MIT
"""The updates of MuonClip for one parameter, in plain PyTorch.

Muon    B <- mu B + (1 - mu) g        u = (1 - mu) g + mu B (Nesterov) or B
        p <- p (1 - lr wd)            p <- p - adjust(lr) NS(u)
AdamW   m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p (1 - lr wd)            p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) +
        eps)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

AdjustLr = str | Callable[[float, tuple[int, int]], float] | None
Orthogonalize = Callable[[Tensor], Tensor]


def adjusted_lr(lr: float, adjust: AdjustLr, shape: tuple[int, int]) -> float:
    """The factor of an orthogonal update of a [rows, columns] matrix.

    ``original``: sqrt(max(1, rows / columns)); ``match_rms_adamw``: 0.2 sqrt(max(rows, columns)),
    which gives the update a root mean square of 0.2, that of AdamW, since an orthogonal matrix has
    1 / sqrt(max(rows, columns)).
    """
    rows, columns = shape
    if callable(adjust):
        return adjust(lr, shape)
    if adjust == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(rows, columns))
    return lr * math.sqrt(max(1.0, rows / columns))


def muon_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    adjust: AdjustLr,
    split_sizes: Sequence[int],
    orthogonalize: Orthogonalize,
) -> None:
    """One Muon update of param [..., rows, in]; `split_sizes` cuts the rows into matrices of their
    own."""
    momentum_buffer.lerp_(grad.to(momentum_buffer.dtype), 1 - momentum)
    # lerp makes a new tensor, so the orthogonalisation can never write into the momentum
    update = grad.lerp(momentum_buffer.to(grad.dtype), momentum) if nesterov else momentum_buffer
    param.mul_(1 - lr * weight_decay)
    for rows, block in zip(
        param.split(split_sizes, -2), update.split(split_sizes, -2), strict=True
    ):
        step = orthogonalize(block)
        rows.add_(step, alpha=-adjusted_lr(lr, adjust, (block.shape[-2], block.shape[-1])))


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update; `step` counts from 1. The order of the operations is that of
    torch.optim.AdamW."""
    beta1, beta2 = betas
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def zeros_like_state(tensor: Tensor) -> Tensor:
    """A zeroed optimizer state for `tensor`."""
    return torch.zeros_like(tensor, memory_format=torch.preserve_format)
