# SPDX-License-Identifier: MIT
"""A small MuonClip of two groups, fed with the same gradients each time."""

import torch
from torch import nn

from kimi_ops import MuonClip


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(rand(*s, seed=i, dtype=dtype)) for i, s in enumerate([(6, 4), (5,)])]


def groups_of(params: list[nn.Parameter], **muon) -> list[dict]:
    return [{"params": params[:1], **muon}, {"params": params[1:], "algorithm": "adamw"}]


def make(dtype: torch.dtype = torch.float32, **options) -> tuple[list[nn.Parameter], MuonClip]:
    params = parameters(dtype)
    return params, MuonClip(groups_of(params), **{"lr": 0.1, **options})


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 2) -> None:
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = rand(*param.shape, seed=10 * step + i, dtype=param.dtype)
        optimizer.step()


def values(params: list[nn.Parameter], optimizer: MuonClip) -> list[torch.Tensor]:
    """Everything that a step moves."""
    state = [x for p in params for x in optimizer.state.get(p, {}).values()]
    return [x.detach().clone() for x in (*params, *state)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
