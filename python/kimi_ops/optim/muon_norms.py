# SPDX-License-Identifier: MIT
"""The norm by which gradients of a group are clipped: of this process's parameters, or of those of
all stages of a pipeline.

Each stage has the squared norms of its own pieces. All of them are gathered in the order of the
stages, which is that of the parameters in one process, and added up as there: the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.optim import engine
from kimi_ops.optim.muon_circle import Circle


class Norms:
    """
    Parameters
    ----------
    group : ProcessGroup or None
        A rank of each stage, in their order; None: this process has all parameters.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._circle: Circle | None = None
        self._lengths: dict[tuple[int, ...], list[list[int]]] = {}  # pieces of all stages, by own

    def clip_factor(
        self, group: dict[str, Any], squares: Tensor, numbers: Mapping[Tensor, range]
    ) -> Tensor | None:
        """min(1, max_grad_norm / norm) over the finite gradients of a group, on their device."""
        if group["max_grad_norm"] is None or not group["params"]:
            return None
        pieces = [numbers[param] for param in group["params"]]
        if self.group is not None:
            squares, pieces = self._of_all(self.group, squares, pieces)
        return engine.clip_factor(squares, pieces, float(group["max_grad_norm"]))

    def _of_all(
        self, group: dist.ProcessGroup, squares: Tensor, pieces: list[range]
    ) -> tuple[Tensor, list[range]]:
        """The squared norms of the parameters of all stages, and which of them are whose."""
        if self._circle is None:
            self._circle = Circle(group)
        circle, lengths = self._circle, tuple(map(len, pieces))
        circle.step += 1
        with circle.told("norms of all stages"):
            if lengths not in self._lengths:
                found: list[Any] = [None] * circle.world
                dist.all_gather_object(found, lengths, group=group)
                self._lengths[lengths] = found
            told = self._lengths[lengths]
            width = max(map(sum, told))
            own = squares.new_zeros(width)
            own[: sum(lengths)] = torch.cat([squares[piece.start : piece.stop] for piece in pieces])
            whole = squares.new_empty(circle.world, width)
            dist.all_gather(list(whole.unbind(0)), own, group=group)
        places = []
        for stage, counts in enumerate(told):
            start = stage * width
            for count in counts:
                places.append(range(start, start + count))
                start += count
        return whole.flatten(), places
