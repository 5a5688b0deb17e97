# SPDX-License-Identifier: MIT
"""Many episodes at once over one cache of latents.

All rows have one length: each step a row takes the next byte that others have said, where there is
one (the rest of its prompt, a tool's result, the user, the next head), or else writes one itself.
So there is no padding and no mask. What is trained on are the ids that were sampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.tasks import Task
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.attention import LatentCache
from kimi_ops.models.kimi_k2.chat import Tokenizer
from kimi_ops.models.kimi_k2.chat.dialogue import IM_END

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
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = 96,
    limit: int = 1024,
) -> list[Rollout]:
    """Play every task with the model.

    Parameters
    ----------
    model : KimiK2
    tokenizer : Tokenizer
    tasks : sequence of Task
        A task may come several times.
    temperature : float
        0: the likeliest id.
    seed : int
    rows : int
        Episodes side by side.
    limit : int
        Ids of an episode; one that does not end before is cut.

    Returns
    -------
    list of Rollout
        In the order of the tasks.
    """
    rolls = [Rollout(Episode(task)) for task in tasks]
    for roll in rolls:
        roll.listen(tokenizer)
    order = sorted(range(len(rolls)), key=lambda i: rolls[i].waiting)
    was_training = model.training
    model.eval()
    draw = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    try:
        for start in range(0, len(order), rows):
            some = [rolls[i] for i in order[start : start + rows]]
            _play(model, tokenizer, some, temperature, draw, limit)
    finally:
        model.train(was_training)
    return rolls


def _play(
    model: KimiK2,
    tokenizer: Tokenizer,
    rolls: list[Rollout],
    temperature: float,
    draw: torch.Generator,
    limit: int,
) -> None:
    weight = model.lm_head.weight
    cache = LatentCache(model.config, len(rolls), limit, device=weight.device, dtype=weight.dtype)
    first = min(roll.waiting for roll in rolls)
    ids = torch.tensor([[roll.take_forced() for _ in range(first)] for roll in rolls])
    while True:
        logits = model(ids.to(weight.device), cache=cache, logits_to_keep=1)[:, -1]
        chosen = _choose(logits, temperature, draw)
        step = []
        for roll, one in zip(rolls, chosen, strict=True):
            if roll.waiting:
                step.append(roll.take_forced())
                continue
            if not roll.episode.finished:
                roll.take(one, tokenizer)
            step.append(one)
        alive = [i for i, roll in enumerate(rolls) if not roll.episode.finished]
        if not alive or cache.length + 1 >= limit:
            return
        if len(alive) <= len(rolls) // 2:  # the others only cost
            cache = cache.chosen(torch.tensor(alive, device=weight.device))
            rolls, step = [rolls[i] for i in alive], [step[i] for i in alive]
        ids = torch.tensor(step)[:, None]


def _choose(logits: Tensor, temperature: float, draw: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits.argmax(-1).tolist()
    shares = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(shares, 1, generator=draw)[:, 0].tolist()
