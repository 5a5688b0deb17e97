# SPDX-License-Identifier: MIT
"""The supervised stage: copying in short rows, then kept trajectories, mixed with text.

The loss is taken on what the assistant writes, its end with it, and a little on everything.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kimi_ops.agentic.drills import recall, repeats, search, wishes
from kimi_ops.agentic.learner import Learner, token_losses
from kimi_ops.agentic.settings import at_least, positive
from kimi_ops.agentic.specs import Tool
from kimi_ops.agentic.synthesis import training_tools

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
    longest : int
        Bytes of a trajectory, at most.
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

    Raises
    ------
    ValueError
        A setting that is too small.
    """

    steps: int = 2800
    longest: int = 768
    size: int = 1920
    warmup: int = 20
    decay: float = 0.75
    rest: float = 0.05
    easy: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, dict.fromkeys(("steps", "longest", "size", "warmup"), 1))
        at_least(self, {"rest": 0.0, "easy": 0.0})
        positive(self, "decay")

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


@cache
def _tools() -> list[Tool]:
    return training_tools()


def _short(rng: random.Random) -> Example:
    return wishes(rng, _tools(), rng.choice((2, 2, 3)), short=True)


def _long(rng: random.Random) -> Example:
    return wishes(rng, _tools(), rng.choice((2, 2, 3)), short=False)


def _far(rng: random.Random) -> Example:
    if rng.random() < 0.3:
        return recall(rng, rng.choice((3, 5, 8)))
    return search(rng, rng.choice((2, 3)))


_drill = _mixed(_far, _short, _long, _long)  # beside trajectories
_CURRICULUM = (
    _Drills("repeats", lambda rng: repeats(rng, 48), 48, 0.25, 0.1),
    _Drills(
        "recall", _mixed(lambda rng: recall(rng, 3), lambda rng: search(rng, 1)), 96, 0.25, 0.12
    ),
    _Drills("far recall", _far, 192, 0.3, 0.08),
    _Drills("wishes", _short, 256, 0.12, 0.3),
)


def packed(source: Source, rng: random.Random, length: int) -> Example:
    """Examples one after the other, `length` + 1 ids, the last one cut."""
    ids: list[int] = []
    learnt: list[bool] = []
    while len(ids) <= length:
        more, own = source(rng)
        ids += more
        learnt += own
    return ids[: length + 1], learnt[: length + 1]


def batch_of(rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Examples one below the other, zeros behind the shorter ones.

    Returns
    -------
    ids : Tensor [rows, length + 1] int64
    learnt, there : Tensor [rows, length] bool
        Of all ids but the first: those that are learnt, and those that are of an example.
    """
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([one + [0] * (width - len(one)) for one, _ in rows])
    learnt = torch.tensor([own + [False] * (width - len(own)) for _, own in rows])
    sizes = torch.tensor([len(one) for one, _ in rows])
    return ids, learnt[:, 1:], torch.arange(1, width) < sizes[:, None]


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

    Raises
    ------
    ValueError
        No trajectory is short enough.
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
        self.learner, self.settings = learner, settings
        self._beside: list[tuple[Source, float]] = [(_drill, 0.5)]
        if text is not None:
            self._beside.append((text, 0.05))
        if pairs:
            self._beside.append((lambda rng: rng.choice(pairs), 0.15))
        by_length = sorted(trajectories, key=lambda one: len(one[0]))
        self._all = by_length[: bisect_left(by_length, settings.longest, key=lambda o: len(o[0]))]
        if not self._all:
            raise ValueError(
                f"Sft: trajectories: expected some of less than {settings.longest} ids, got "
                f"{len(by_length)} of {len(by_length[0][0]) if by_length else 'any number'} and "
                "more; raise SftSettings.longest or make more attempts"
            )
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
            name, count = part.name, max(1, self.settings.size // part.length)
            rows = [packed(part.source, self._rng, part.length) for _ in range(count)]
        else:
            name, rows = "trajectories", self._trajectories()
        ids, learnt, there = batch_of(rows)
        loss = self._update(ids, learnt, there)
        self.made += 1
        self._running = loss if self._running is None else 0.95 * self._running + 0.05 * loss
        if self._part < len(_CURRICULUM):
            made, most = self.made - self._begun, round(part.share * self.settings.steps)
            if made >= most or made >= 30 and self._running < part.goal:
                self._part, self._begun, self._running = self._part + 1, self.made, None
        return SftStep(self.made, name, loss, learnt.numel())

    def _update(self, ids: Tensor, learnt: Tensor, there: Tensor) -> float:
        device = self.learner.model.lm_head.weight.device
        ids, learnt, there = ids.to(device), learnt.to(device), there.to(device)
        shown = []

        def loss() -> Tensor:
            losses = token_losses(self.learner.model(ids[:, :-1]), ids)
            own = ((losses * learnt).sum(1) / learnt.sum(1).clamp(min=1)).mean()
            shown.append(own.detach())
            return own + self.settings.rest * losses[there].mean()

        self.learner.step(loss, self.settings.factor(self.made))
        return float(shown[0])

    def _trajectories(self) -> list[Example]:
        """Episodes of about one length, some of them replaced by drills and text so that neither
        is forgotten."""
        rng, early = self._rng, self.made < self.settings.easy * self.settings.steps
        known = self._all[: (len(self._all) + 1) // 2] if early else self._all
        last = rng.randrange(len(known))
        length = len(known[last][0]) - 1
        count = max(1, self.settings.size // length)
        first = max(0, last + 1 - count)
        rows = list(known[first : first + count])
        for place in range(len(rows)):
            chance = rng.random()
            for source, share in self._beside:
                if 0 <= chance < share:
                    rows[place] = packed(source, rng, length)
                chance -= share
        return rows

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
