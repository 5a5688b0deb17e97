# SPDX-License-Identifier: MIT
"""fp32 masters of 16-bit parameters: a state like the momentum, with the rank that owns the rows.

gradient -> master += update (fp32) -> parameter = master, rounded
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kimi_ops.optim.muon_update import Work

MASTER = "master"  # its name among the states


def mastered(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter has an fp32 master."""
    return group["master_weights"] and param.dtype in (torch.bfloat16, torch.float16)


def worked(param: Tensor, grad: Tensor, state: dict[str, Tensor], *more: Any) -> Work:
    """The work on a parameter, or on the master in its state."""
    master = state.get(MASTER)
    if master is None:
        return Work(param, grad, state, *more)
    work = Work(master, grad, state, *more)
    work.shown = param
    return work


def rounded(work: Iterable[Work]) -> None:
    """Give parameters what their masters have become."""
    pairs = [(item.shown, item.param) for item in work if item.shown is not None]
    if pairs:
        shown, masters = map(list, zip(*pairs, strict=True))
        torch._foreach_copy_(shown, masters)
