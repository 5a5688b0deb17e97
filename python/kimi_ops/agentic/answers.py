# SPDX-License-Identifier: MIT
"""Answers of a model as tensors, and how likely the model thinks them.

Rows are padded behind their ends: attention is causal, so no id of an answer sees any of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_ops.agentic.objective import chosen_log_probs, log_ratios
from kimi_ops.agentic.rollout import Rollout
from kimi_ops.models.kimi_k2 import KimiK2

__all__ = ["Answers"]

PIECE = 8192  # ids of a forward


@dataclass(frozen=True)
class Answers:
    """N different answers.

    Attributes
    ----------
    ids : Tensor [N, S + 1] int64
    own : Tensor [N, S] bool
        Which of the ids behind the first the model wrote.
    sizes : Tensor [N]
        Ids of each row without padding.
    temperatures : Tensor [N]
        At which they were drawn.
    advantage : Tensor [N]
        Mean of those given alike.
    times : Tensor [N]
        How often each was given.
    old : Tensor [N, S]
        Log probabilities under the policy that wrote them.
    """

    ids: Tensor
    own: Tensor
    sizes: Tensor
    temperatures: Tensor
    advantage: Tensor
    times: Tensor
    old: Tensor

    @classmethod
    def of(
        cls, rolls: Sequence[Rollout], temperatures: Tensor, advantage: Tensor, device: torch.device
    ) -> Answers:
        """Of rollouts, those alike once, with the mean of their advantages: its gradient is the
        mean of theirs. `old` is 0 as yet.

        Parameters
        ----------
        rolls : sequence of Rollout
        temperatures, advantage : Tensor [len(rolls)]
        device : torch.device
        """
        places: dict[tuple[float, tuple[int, ...]], list[int]] = {}
        for place, (roll, drawn) in enumerate(zip(rolls, temperatures.tolist(), strict=True)):
            places.setdefault((drawn, tuple(roll.ids)), []).append(place)
        which = [some[0] for some in places.values()]
        times = torch.tensor([len(some) for some in places.values()])
        sizes = torch.tensor([len(ids) for _, ids in places])
        ids = torch.zeros(len(which), int(sizes.max()), dtype=torch.int64)
        own = torch.zeros(ids.shape, dtype=torch.bool)
        for row, roll in enumerate(rolls[place] for place in which):
            ids[row, : len(roll.ids)] = torch.tensor(roll.ids)
            own[row, : len(roll.own)] = torch.tensor(roll.own)
        old = torch.zeros(own[:, 1:].shape, dtype=torch.float32)
        better = torch.stack([advantage[some].mean() for some in places.values()])
        made = (ids, own[:, 1:], sizes, temperatures[which], better, times, old)
        return cls(*(one.to(device) for one in made))

    def part(self, rows: Tensor) -> Answers:
        """These rows alone, as wide as the longest of them."""
        wide = int(self.sizes[rows].max())
        return Answers(
            self.ids[rows, :wide], self.own[rows, : wide - 1], self.sizes[rows],
            self.temperatures[rows], self.advantage[rows], self.times[rows],
            self.old[rows, : wide - 1],
        )  # fmt: skip

    def pieces(self) -> Iterator[Tensor]:
        """Rows of like sizes, of at most `PIECE` ids with their padding."""
        order = self.sizes.argsort(descending=True, stable=True)
        start = 0
        while start < len(order):
            count = max(1, PIECE // int(self.sizes[order[start]]))
            yield order[start : start + count]
            start += count

    def log_probs(self, model: KimiK2) -> tuple[Tensor, Tensor]:
        """Of the ids behind the first, [N, S], and the entropies of what they were drawn from."""
        return chosen_log_probs(model(self.ids[:, :-1]), self.ids, self.temperatures)

    @torch.no_grad()
    def remembered(self, model: KimiK2) -> tuple[Answers, float]:
        """With `old` under the model as it is, by the path that training takes, whose rounding is
        not that of sampling; and the mean entropy of an own id."""
        old, total = torch.zeros_like(self.old), 0.0
        for rows in self.pieces():
            part = self.part(rows)
            logs, entropies = part.log_probs(model)
            old[rows, : logs.shape[1]] = logs
            total += float(entropies[part.own].sum())
        model.reset_statistics()
        return dataclasses.replace(self, old=old), total / int(self.own.sum())

    def ratios(self, model: KimiK2) -> Tensor:
        """s [N] of the model's policy over the old one."""
        found = self.old.new_zeros(len(self.ids))
        for rows in self.pieces():
            part = self.part(rows)
            logs, _ = part.log_probs(model)
            found = found.index_add(0, rows, log_ratios(logs, part.old, part.own))
        return found

    @property
    def lengths(self) -> Tensor:
        """Own ids [N] of each answer."""
        return self.own.sum(1)

    def mean(self, values: Tensor) -> Tensor:
        """Of values [N], over all that were given."""
        return (values * self.times).sum() / self.times.sum()
