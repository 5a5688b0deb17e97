# SPDX-License-Identifier: MIT
"""The elementwise passes of MuonClip for one parameter, in plain PyTorch.

Muon    B <- mu B + (1 - mu) g        u = (1 - mu) g + mu B (Nesterov) or B
        p <- p (1 - lr wd)            p <- p - adjust(lr) NS(u)
AdamW   m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p (1 - lr wd)            p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) +
        eps)

Arithmetic is fp32 (fp64 for fp64 parameters) whatever the dtypes of parameter, gradient and state;
each is rounded once when it is written. `alive`, a 0-dim bool tensor, leaves parameter and state
alone where it is False, without a read on the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def commit_(target: Tensor, new: Tensor, alive: Tensor | None) -> None:
    target.copy_(new if alive is None else torch.where(alive, new.to(target.dtype), target))


def momentum_(
    grad: Tensor,
    buffer: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    maximize: bool = False,
    alive: Tensor | None = None,
) -> Tensor:
    """Move `buffer` towards the gradient; returns what Newton-Schulz takes, a tensor of its own."""
    grad = grad.to(wide(buffer))
    if maximize:
        grad = -grad
    moved = buffer.to(grad.dtype).lerp(grad, 1 - momentum)
    commit_(buffer, moved, alive)
    return grad.lerp(moved, momentum) if nesterov else moved


def decayed(param: Tensor, direction: Tensor, rate: float, cautious: bool) -> Tensor:
    """param (1 - rate); cautious: only where a step against `direction` shrinks the parameter."""
    if not cautious:
        return param * (1 - rate)
    return torch.where(direction * param > 0, param * (1 - rate), param)


def apply_(
    param: Tensor,
    direction: Tensor,
    *,
    lr: float,
    rate: float,
    weight_decay: float,
    cautious: bool = False,
    alive: Tensor | None = None,
) -> None:
    """Decay `param` by lr weight_decay and step against the orthogonal `direction` by `rate`."""
    old, direction = param.to(wide(param)), direction.to(wide(param))
    new = decayed(old, direction, lr * weight_decay, cautious)
    commit_(param, new.add_(direction, alpha=-rate), alive)


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
    maximize: bool = False,
    cautious: bool = False,
    alive: Tensor | None = None,
) -> None:
    """One AdamW update; `step` counts from 1. The order of the operations is that of
    torch.optim.AdamW."""
    beta1, beta2 = betas
    grad = grad.to(wide(param))
    if maximize:
        grad = -grad
    first = exp_avg.to(grad.dtype).lerp(grad, 1 - beta1)
    second = (exp_avg_sq.to(grad.dtype) * beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    new = decayed(param.to(grad.dtype), first, lr * weight_decay, cautious)
    commit_(param, new.addcdiv_(first, denominator, value=-lr / (1 - beta1**step)), alive)
    commit_(exp_avg, first, alive)
    commit_(exp_avg_sq, second, alive)
