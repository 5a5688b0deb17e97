# SPDX-License-Identifier: MIT
"""Many episodes at once over one cache of latents.

All rows have one length: each step a row takes the next byte that others have said, where there is
one (the rest of its prompt, a tool's result, the user, the next head), or else writes one itself.
So there is no padding and no mask. What is trained on are the ids that were sampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.tasks import Task
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.attention import LatentCache
from kimi_ops.models.kimi_k2.chat import Tokenizer
from kimi_ops.models.kimi_k2.chat.dialogue import IM_END
from kimi_ops.models.kimi_k2.sampling import Processor

__all__ = ["Rollout", "roll_out"]


@dataclass
class Rollout:
    """An episode as ids.

    Attributes
    ----------
    episode : Episode
    ids : list of int
    own : list of bool
        Which of them the model wrote.
    """

    episode: Episode
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    _queue: deque[int] = field(default_factory=deque)
    _turn: list[int] = field(default_factory=list)

    def listen(self, tokenizer: Tokenizer) -> None:
        """What others have said stands before what the model writes next."""
        for place, text in enumerate(self.episode.said):
            marker = place % 2 == 1
            self._queue += [tokenizer.markers[text]] if marker else tokenizer.encode(text)

    @property
    def waiting(self) -> int:
        """Ids that others have said and that the model has not seen."""
        return len(self._queue)

    def take_forced(self) -> int:
        one = self._queue.popleft()
        self.ids.append(one)
        self.own.append(False)
        return one

    def take(self, one: int, tokenizer: Tokenizer) -> None:
        """One id that the model chose; at its turn's end others speak."""
        self.ids.append(one)
        self.own.append(True)
        self._turn.append(one)
        over = sum(self.own) > self.episode.task.rubric.budget
        if one == tokenizer.markers[IM_END] or over:
            written, self._turn = parts_of(self._turn, tokenizer), []
            self.episode.take(written)
            if not self.episode.finished:
                self.listen(tokenizer)


def parts_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Texts and markers in turns, from a text on."""
    spellings = {place: marker for marker, place in tokenizer.markers.items()}
    parts, run = [], list[int]()
    for one in ids:
        if one in spellings:
            parts += [tokenizer.decode(run), spellings[one]]
            run = []
        else:
            run.append(one)
    return [*parts, tokenizer.decode(run)] if run or not parts else parts


@torch.no_grad()
def roll_out(
    model: KimiK2,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
    rows: int = 96,
    limit: int = 1024,
    enforcer: Callable[[Sequence[Mapping[str, Any]]], Processor] | None = None,
) -> list[Rollout]:
    """Play every task with the model.

    Parameters
    ----------
    model : KimiK2
    tokenizer : Tokenizer
    tasks : sequence of Task
        A task may come several times: equal prompts are computed once.
    temperature : float or sequence of float
        Of all tasks or of each; 0: the likeliest id.
    seed : int
    rows : int
        Episodes side by side.
    limit : int
        Ids of an episode; one that does not end before is cut.
    enforcer : callable, optional
        Makes of a task's declarations what keeps calls to them, as
        :class:`~kimi_ops.models.kimi_k2.chat.Enforcer` does for bytes: then a call is malformed
        only where the budget or the limit cuts it.

    Returns
    -------
    list of Rollout
        In the order of the tasks.

    Raises
    ------
    ValueError
        Not one temperature for each task.
    """
    each = list(temperature) if isinstance(temperature, Sequence) else [temperature] * len(tasks)
    if len(each) != len(tasks):
        raise ValueError(
            f"roll_out: temperature: expected one for each of {len(tasks)} tasks, got {len(each)}; "
            "pass one number for all"
        )
    rolls = [Rollout(Episode(task)) for task in tasks]
    for roll in rolls:
        roll.listen(tokenizer)
    order = sorted(range(len(rolls)), key=lambda i: rolls[i].waiting)
    was_training = model.training
    model.eval()
    draw = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    try:
        for start in range(0, len(order), rows):
            some = [
                _Row(
                    rolls[i],
                    each[i],
                    enforcer and enforcer([tool.declaration for tool in tasks[i].tools]),
                )
                for i in order[start : start + rows]
            ]
            _play(model, tokenizer, some, draw, limit)
    finally:
        model.train(was_training)
    return rolls


@dataclass
class _Row:
    """An episode that is played."""

    roll: Rollout
    temperature: float
    enforcer: Processor | None

    def allowed(self, logits: Tensor) -> Tensor:
        """Logits [1, V] of what the episode may go on with."""
        ids = torch.tensor([self.roll.ids], device=logits.device)
        return logits if self.enforcer is None else self.enforcer(ids, logits)


def _play(
    model: KimiK2, tokenizer: Tokenizer, rows: list[_Row], draw: torch.Generator, limit: int
) -> None:
    logits, cache = _prefilled(model, rows, limit)
    while True:
        chosen = _choose(logits, rows, draw)
        step = []
        for row, one in zip(rows, chosen, strict=True):
            roll = row.roll
            if roll.waiting:
                step.append(roll.take_forced())
                continue
            if not roll.episode.finished:
                roll.take(one, tokenizer)
            step.append(one)
        alive = [i for i, row in enumerate(rows) if not row.roll.episode.finished]
        if not alive or cache.length + 1 >= limit:
            return
        if len(alive) <= len(rows) // 2:  # the others only cost
            cache = cache.chosen(torch.tensor(alive, device=logits.device))
            rows, step = [rows[i] for i in alive], [step[i] for i in alive]
        ids = torch.tensor(step, device=logits.device)[:, None]
        logits = model(ids, cache=cache, logits_to_keep=1)[:, -1]


def _prefilled(model: KimiK2, rows: list[_Row], limit: int) -> tuple[Tensor, LatentCache]:
    """Logits behind what all rows have to hear first, and the cache of it; rows that hear the same
    are computed once."""
    weight = model.lm_head.weight
    first = min(row.roll.waiting for row in rows)
    heard = [tuple(row.roll.take_forced() for _ in range(first)) for row in rows]
    places = {ids: place for place, ids in enumerate(dict.fromkeys(heard))}
    ids = torch.tensor(list(places), device=weight.device)
    cache = LatentCache(model.config, len(places), limit, device=weight.device, dtype=weight.dtype)
    logits = model(ids, cache=cache, logits_to_keep=1)[:, -1]
    index = torch.tensor([places[ids] for ids in heard], device=weight.device)
    return logits[index], cache.chosen(index)


def _choose(logits: Tensor, rows: list[_Row], draw: torch.Generator) -> list[int]:
    """An id for every row; those of rows that wait or are finished are not looked at."""
    if any(row.enforcer for row in rows):
        logits = torch.cat([
            one if row.roll.waiting or row.roll.episode.finished else row.allowed(one)
            for row, one in zip(rows, logits.split(1), strict=True)
        ])  # fmt: skip
    temperatures = logits.new_tensor([[row.temperature] for row in rows], dtype=torch.float32)
    likeliest = logits.argmax(-1)
    if not temperatures.any():
        return likeliest.tolist()
    shares = (logits.float() / temperatures.clamp(min=1e-6)).softmax(-1)
    drawn = torch.multinomial(shares, 1, generator=draw)[:, 0]
    return torch.where(temperatures[:, 0] > 0, drawn, likeliest).tolist()
