# SPDX-License-Identifier: MIT
"""fp32 masters of 16-bit parameters: a state like the momentum, with the rank that owns the rows.

gradient -> master += update (fp32) -> parameter = master, rounded
"""

from __future__ import annotations

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
