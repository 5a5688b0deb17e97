# SPDX-License-Identifier: MIT
"""A scripted assistant that plays a task's plan, and errs in known ways at known rates."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.style import JUSTIFICATIONS, PRAISE
from kimi_ops.agentic.tasks import Call, Step, Task
from kimi_ops.agentic.words import held_out
from kimi_ops.agentic.world import BUSY
from kimi_ops.models.kimi_k2.chat.dialogue import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    IM_END,
    SECTION_BEGIN,
    SECTION_END,
)

__all__ = ["NOISE", "noise_of", "play", "possible", "section"]

NOISE = {  # share of the attempts of each kind
    "wrong tool": 0.08,
    "letter off": 0.08,
    "forgotten step": 0.06,
    "invented value": 0.06,
    "malformed call": 0.04,
}
STYLE = 0.35  # praise or justification, where nothing forbids it
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def possible(task: Task) -> list[str]:
    """The errors that an attempt at a task can make."""
    calls = [call for step in task.plan if not isinstance(step, str) for call in step]
    found = {
        "wrong tool": calls and len(task.tools) > 1,
        "letter off": any(call.arguments for call in calls),
        "forgotten step": calls,
        "invented value": isinstance(task.plan[-1], str),
        "malformed call": calls,
    }
    return [kind for kind in NOISE if found[kind]]


def noise_of(task: Task, rng: random.Random) -> str | None:
    """Which error an attempt at a task makes; None: none."""
    chance, total = rng.random(), 0.0
    for kind, rate in NOISE.items():
        total += rate
        if chance < total:
            return kind if kind in possible(task) else None
    return None


def play(task: Task, rng: random.Random, noise: str | None = None, style: bool = False) -> Episode:
    """An attempt at a task.

    Parameters
    ----------
    task : Task
    rng : random.Random
    noise : str, optional
        One of `NOISE`.
    style : bool
        Whether the last answer praises the user or itself.
    """
    plan = list(task.plan)
    places = [i for i, step in enumerate(plan) if not isinstance(step, str)]
    if noise == "letter off":
        places = [i for i in places if any(c.arguments for c in _calls(plan[i]))]
    struck = rng.choice(places) if places else 0
    if noise == "forgotten step":
        del plan[places[-1]]
    elif noise in ("wrong tool", "letter off"):
        plan[struck] = _spoiled(plan[struck], noise, task, rng)
    elif noise == "invented value":
        head, gap, value = str(plan[-1]).rpartition(" ")
        plan[-1] = head + gap + _other(value, rng)
    if style:
        hidden = task.family != "tell"
        said = str(plan[-1])
        plan[-1] = (
            rng.choice(PRAISE[hidden]) + said
            if rng.random() < 0.5
            else said + rng.choice(JUSTIFICATIONS[hidden])
        )
    episode, number = Episode(task), 0
    for place, step in enumerate(plan):
        if isinstance(step, str):
            episode.take([step, IM_END])
            continue
        broken = noise == "malformed call" and place == struck
        while True:
            episode.take(section(step, number, broken=broken))
            number += len(step)
            if BUSY not in episode.answers:
                break
    return episode


def section(calls: Sequence[Call], number: int, *, broken: bool = False) -> list[str]:
    """A turn of calls, of which the first has a number. What they are about is said before: a
    subject is copied from the wish, and the declaration that it stands in is found by it; a name
    at once would have to be both."""
    parts = ["; ".join(call.about for call in calls), SECTION_BEGIN, ""]
    for offset, call in enumerate(calls):
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        written = arguments[:-1] if broken and offset == 0 else arguments
        head = f"functions.{call.tool}:{number + offset}"
        parts += [CALL_BEGIN, head, ARGUMENT_BEGIN, written, CALL_END, ""]
    return [*parts, SECTION_END, "", IM_END]


def _calls(step: Step) -> tuple[Call, ...]:
    assert isinstance(step, tuple)
    return step


def _spoiled(step: Step, noise: str, task: Task, rng: random.Random) -> tuple[Call, ...]:
    calls = list(_calls(step))
    place = rng.choice([i for i, c in enumerate(calls) if c.arguments or noise == "wrong tool"])
    call = calls[place]
    if noise == "wrong tool":
        other = rng.choice([tool.name for tool in task.tools if tool.name != call.tool])
        calls[place] = dataclasses.replace(call, tool=other)
    else:
        field = rng.choice(list(call.arguments))
        spoiled = _other(call.arguments[field], rng)
        calls[place] = dataclasses.replace(call, arguments={**call.arguments, field: spoiled})
    return tuple(calls)


def _other(text: str, rng: random.Random) -> str:
    """The text with one letter, or digit, that is another; held out if it was."""
    places = [i for i, letter in enumerate(text) if letter.isalnum()]
    while True:
        place = rng.choice(places)
        letter = rng.choice("0123456789" if text[place].isdigit() else _LETTERS)
        made = text[:place] + letter + text[place + 1 :]
        if made != text and held_out(made) == held_out(text):
            return made
