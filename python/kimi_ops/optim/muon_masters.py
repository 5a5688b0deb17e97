# SPDX-License-Identifier: MIT
"""fp32 masters of 16-bit parameters: a state like the momentum, with the rank that owns the rows.

gradient -> master += update (fp32) -> parameter = master, rounded
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kimi_ops.optim.muon_mesh import local, sharded
from kimi_ops.optim.muon_shards import Shards
from kimi_ops.optim.muon_update import Work

MASTER = "master"  # its name among the states


def mastered(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter has an fp32 master."""
    return group["master_weights"] and param.dtype in (torch.bfloat16, torch.float16)


def followed(
    param: Tensor, left: Tensor | None, master: Tensor, rows: Callable[[Tensor], Tensor]
) -> None:
    """Give a master what was written to its parameter since the last step: entries that are not
    what that step `left`, the master rounded where it is None. `rows` are those of a tensor like
    the parameter that this rank has."""
    shown, master = local(rows(param.detach())), local(master)
    left = master.to(shown.dtype) if left is None else local(rows(left))
    master.copy_(torch.where(left == shown, master, shown.float()))


def worked(param: Tensor, grad: Tensor, state: dict[str, Tensor], *more: Any) -> Work:
    """The work on a parameter, or on the master in its state."""
    master = state.get(MASTER)
    if master is None:
        return Work(param, grad, state, *more)
    work = Work(master, grad, state, *more)
    work.shown = param
    return work


def rows_of_masters(
    params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Tensor]], shards: Shards
) -> dict[Tensor, list[tuple[Tensor, int]]]:
    """Of each parameter the rows of its master that this rank has, and the first of each."""
    found: dict[Tensor, list[tuple[Tensor, int]]] = {}
    for param in params:
        master = state[param].get(MASTER) if param in state else None
        if master is None or not master.ndim:
            continue
        if sharded(param) or shards.process_group is None:
            found[param] = [(local(master), 0)]
            continue
        pieces = [shards.pieces[i] for i in shards.mine(param)]
        rows = master.split([piece.stop - piece.start for piece in pieces])
        found[param] = [(r, p.start) for r, p in zip(rows, pieces, strict=True)]
    return found
