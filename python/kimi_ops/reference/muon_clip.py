# SPDX-License-Identifier: MIT
"""The elementwise passes of MuonClip for one parameter, in plain PyTorch.

Muon    B <- mu B + (1 - mu) g        u = (1 - mu) g + mu B (Nesterov) or B
        p <- p (1 - lr wd)            p <- p - adjust(lr) NS(u)
AdamW   m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p (1 - lr wd)            p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) +
        eps)

Arithmetic is fp32 (fp64 for fp64 parameters) whatever the dtypes of parameter, gradient and state;
each is rounded once when it is written. `alive`, a 0-dim bool tensor, leaves parameter and state
alone where it is False, without a read on the host. `lr` and `weight_decay` may be 0-dim tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Move `buffer` towards the gradient; returns what Newton-Schulz takes, a tensor of its own,
    zeros where it is left alone."""
    grad = grad.to(wide(buffer))
    if maximize:
        grad = -grad
    moved = buffer.to(grad.dtype).lerp(grad, 1 - momentum)
    commit_(buffer, moved, alive)
    update = grad.lerp(moved, momentum) if nesterov else moved
    return update if alive is None else torch.where(alive, update, 0.0)


def decayed(param: Tensor, direction: Tensor, rate: float | Tensor, cautious: bool) -> Tensor:
    """param (1 - rate); cautious: only where a step against `direction` shrinks the parameter."""
    if not cautious:
        return param * (1 - rate)
    return torch.where(direction * param > 0, param * (1 - rate), param)


def apply_(
    param: Tensor,
    direction: Tensor,
    *,
    lr: float | Tensor,
    rate: float | Tensor,
    weight_decay: float | Tensor,
    cautious: bool = False,
    alive: Tensor | None = None,
) -> None:
    """Decay `param` by lr weight_decay and step against the orthogonal `direction` by `rate`."""
    old, direction = param.to(wide(param)), direction.to(wide(param))
    new = decayed(old, direction, lr * weight_decay, cautious)
    if isinstance(rate, Tensor):
        new.sub_(direction * rate)
    else:
        new.add_(direction, alpha=-rate)
    commit_(param, new, alive)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    maximize: bool = False,
    cautious: bool = False,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """One AdamW update with `scale` times the gradient; `step`, 0-dim, counts them. The order of
    the operations is that of torch.optim.AdamW."""
    beta1, beta2 = betas
    grad = grad.to(wide(param))
    if scale is not None:
        grad = grad * scale
    if maximize:
        grad = -grad
    count = step.double() + 1
    first = exp_avg.to(grad.dtype).lerp(grad, 1 - beta1)
    second = (exp_avg_sq.to(grad.dtype) * beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (second.sqrt() / (1 - beta2**count).sqrt()).add_(eps)
    new = decayed(param.to(grad.dtype), first, lr * weight_decay, cautious)
    new = new + first * (-lr / (1 - beta1**count)) / denominator
    commit_(param, new, alive)
    commit_(exp_avg, first, alive)
    commit_(exp_avg_sq, second, alive)
    commit_(step, count, alive)


def clip_factor(squares: Tensor, pieces: Sequence[range], max_norm: float) -> Tensor:
    """min(1, max_norm / norm), 0-dim fp32: the norm of the tensors whose `pieces` of `squares` are
    all finite, of those together."""
    sums = torch.stack([squares[piece.start : piece.stop].sum() for piece in pieces])
    norm = torch.where(torch.isfinite(sums), sums, 0.0).sum().sqrt()
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
