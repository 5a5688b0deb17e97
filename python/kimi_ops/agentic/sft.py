# SPDX-License-Identifier: MIT
"""The supervised stage: copying in short rows, then kept trajectories, mixed with text.

The loss is taken on what the assistant writes, its end with it, and a little on everything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_ops.agentic.drills import recall, repeats
from kimi_ops.agentic.learner import Learner, token_losses

__all__ = ["Example", "Sft", "SftSettings", "SftStep", "batch_of"]

Example = tuple[list[int], list[bool]]  # ids, and which of them are learnt
Source = Callable[[random.Random], Example]


@dataclass(frozen=True)
class SftSettings:
    """
    Attributes
    ----------
    steps : int
        Updates in all.
    lengths : tuple of int
        Bytes of a row of trajectories; each step takes one of them in turn.
    size : int
        Bytes of a step, at most.
    warmup : int
        Updates until the peak learning rate.
    decay : float
        Share of the updates, the last ones, over which it falls to 0.
    rest : float
        Weight of the loss on everything.
    easy : float
        Share of the updates until when only short episodes come.
    seed : int
    """

    steps: int = 1500
    lengths: tuple[int, ...] = (384, 384, 640)
    size: int = 1920
    warmup: int = 20
    decay: float = 0.35
    rest: float = 0.05
    easy: float = 0.35
    seed: int = 0

    def factor(self, step: int) -> float:
        """Share of the peak learning rate."""
        left = (self.steps - step) / (self.steps * self.decay)
        return min(1.0, (step + 1) / self.warmup, left)


@dataclass(frozen=True)
class SftStep:
    """
    Attributes
    ----------
    step : int
        From 1.
    stage : str
    loss : float
        Nats a byte of what is learnt.
    size : int
        Bytes of the rows.
    """

    step: int
    stage: str
    loss: float
    size: int


@dataclass(frozen=True)
class _Drills:
    """A part of the curriculum: over where the running loss is under its goal, or its share of the
    updates is spent."""

    name: str
    source: Source
    length: int
    goal: float
    share: float


def _mixed(*sources: Source) -> Source:
    return lambda rng: rng.choice(sources)(rng)


_CURRICULUM = (
    _Drills("repeats", lambda rng: repeats(rng, 48), 48, 0.25, 0.15),
    _Drills(
        "recall", _mixed(lambda rng: repeats(rng, 96), lambda rng: recall(rng, 3)), 96, 0.25, 0.15
    ),
    _Drills("far recall", lambda rng: recall(rng, rng.choice((5, 8))), 160, 0.3, 0.1),
)


def batch_of(source: Source, rng: random.Random, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows of examples one after the other, the last one cut.

    Returns
    -------
    ids : Tensor [rows, length + 1] int64
    weights : Tensor [rows, length] float32
        Of the losses on all ids but the first; they add up to 1.
    """
    ids, learnt = [], []
    for _ in range(rows):
        row: list[int] = []
        mask: list[bool] = []
        while len(row) <= length:
            more, own = source(rng)
            row += more
            mask += own
        ids.append(row[: length + 1])
        learnt.append(mask[1 : length + 1])
    weights = torch.tensor(learnt, dtype=torch.float32)
    return torch.tensor(ids), weights / weights.sum().clamp(min=1)


class Sft:
    """The stage, update by update.

    Parameters
    ----------
    learner : Learner
    trajectories : sequence of (ids, learnt)
        Kept episodes.
    settings : SftSettings
    text : callable, optional
        Rows of other text, one of 20.
    pairs : sequence of (ids, learnt)
        Comparisons for the critic, three of 20 rows where there are any.
    """

    def __init__(
        self,
        learner: Learner,
        trajectories: Sequence[Example],
        settings: SftSettings,
        *,
        text: Source | None = None,
        pairs: Sequence[Example] = (),
    ) -> None:
        self.learner, self.settings, self._text = learner, settings, text
        self._pairs = pairs
        self._all = trajectories
        self._easy = sorted(trajectories, key=lambda one: len(one[0]))[: len(trajectories) // 2]
        self._rng = random.Random(f"sft {settings.seed}")
        self.made = 0  # updates
        self._part = self._begun = 0  # of the curriculum, and the update it began with
        self._running: float | None = None

    @property
    def finished(self) -> bool:
        return self.made >= self.settings.steps

    def step(self) -> SftStep:
        """One update."""
        if self._part < len(_CURRICULUM):
            part = _CURRICULUM[self._part]
            name, source, length = part.name, part.source, part.length
        else:
            name, length = "trajectories", self.settings.lengths[self.made % self._turns]
            source = self._fitting(length)
        rows = max(1, self.settings.size // length)
        ids, weights = batch_of(source, self._rng, rows, length)
        loss = self._update(ids, weights)
        self.made += 1
        self._running = loss if self._running is None else 0.95 * self._running + 0.05 * loss
        if self._part < len(_CURRICULUM):
            made, most = self.made - self._begun, round(part.share * self.settings.steps)
            if made >= most or made >= 30 and self._running < part.goal:
                self._part, self._begun, self._running = self._part + 1, self.made, None
        return SftStep(self.made, name, loss, rows * length)

    @property
    def _turns(self) -> int:
        return len(self.settings.lengths)

    def _update(self, ids: Tensor, weights: Tensor) -> float:
        device = self.learner.model.lm_head.weight.device
        ids, weights = ids.to(device), weights.to(device)
        shown = []

        def loss() -> Tensor:
            losses = token_losses(self.learner.model(ids[:, :-1]), ids)
            own = (losses * weights).sum()
            shown.append(own.detach())
            return own + self.settings.rest * losses.mean()

        self.learner.step(loss, self.settings.factor(self.made))
        return float(shown[0])

    def _fitting(self, length: int) -> Source:
        """Episodes that fit a row, beside drills and text so that neither is forgotten."""
        known = self._easy if self.made < self.settings.easy * self.settings.steps else self._all
        fitting = [example for example in known if len(example[0]) <= length]

        def one(rng: random.Random) -> Example:
            chance = rng.random()
            if chance < 0.05 and self._text is not None:
                return self._text(rng)
            if chance < 0.15:
                return recall(rng, rng.choice((3, 5, 8)))
            if chance < 0.3 and self._pairs:
                return rng.choice(self._pairs)
            return rng.choice(fitting)

        return one

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on, but for the data."""
        return {
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "rng": self._rng.getstate(),
            "place": (self.made, self._part, self._begun, self._running),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.model.load_state_dict(state["model"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self._rng.setstate(state["rng"])
        self.made, self._part, self._begun, self._running = state["place"]
