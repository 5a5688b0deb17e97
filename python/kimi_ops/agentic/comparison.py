# SPDX-License-Identifier: MIT
"""Two answers side by side: what of an episode is shown to a critic, and what code says of each
line of the rubric."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from kimi_ops.agentic.judge import well_formed
from kimi_ops.agentic.rollout import Rollout
from kimi_ops.agentic.style import boasts, praises
from kimi_ops.models.kimi_k2.chat.dialogue import MARKERS

__all__ = ["Answer", "Comparison", "one_line", "reasons", "unequal", "verdict"]

LONGEST_RESULT, LONGEST_ANSWER = 24, 96  # characters that are shown

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What the critic sees of an episode.

    Attributes
    ----------
    evidence : str
        The calls and what they gave.
    said : str
        What the user was told.
    """

    evidence: str
    said: str

    @classmethod
    def of(cls, messages: Messages) -> Answer:
        """The assistant's part of a conversation, in one line and without markers, so that no
        answer can draw the prompt anew."""
        said, calls, given = list[str](), list[str](), list[str]()
        for message in messages:
            if message["role"] == "tool":
                given.append(message["content"][:LONGEST_RESULT])
            elif message["role"] == "assistant":
                if not message.get("tool_calls"):  # else it is what the calls are about
                    said.append(message["content"])
                for call in message.get("tool_calls", ()):
                    function = call["function"]
                    values = ", ".join(map(str, json.loads(function["arguments"]).values()))
                    calls.append(f"{function['name']}({values})")
        made = (f"{call}={result}" for call, result in zip(calls, given, strict=True))
        told = one_line(" / ".join(filter(None, said)))
        return cls(one_line(", ".join(made)), told[:LONGEST_ANSWER])


@dataclass(frozen=True)
class Comparison:
    """Two answers to one question; which of them is shown first matters to a critic that has a
    favourite place."""

    question: str
    first: Answer
    second: Answer

    @classmethod
    def of(cls, users: Iterable[str], first: Messages, second: Messages) -> Comparison:
        """Of two attempts at one task, and what its user says."""
        return cls(one_line(" / ".join(users)), Answer.of(first), Answer.of(second))

    @property
    def swapped(self) -> Comparison:
        return Comparison(self.question, self.second, self.first)


def one_line(text: str) -> str:
    """A text without markers and line breaks."""
    found = None
    while found != text:  # what is left must not spell a marker either
        found = text
        for marker in MARKERS:
            text = text.replace(marker, "")
    return "".join(one if one.isprintable() else " " for one in text)


def reasons(one: Answer, other: Answer, right: tuple[bool, bool]) -> dict[str, str]:
    """Which answer is the better in each line of the rubric, A, B or `=`: g (grounded), p (no
    praise), j (no justification of itself).

    Parameters
    ----------
    one, other : Answer
    right : tuple of bool
        Whether each is what the task asked for.

    Examples
    --------
    >>> from kimi_ops.agentic.comparison import Answer, reasons
    >>> one, other = Answer("level_get(oak)=7", "7"), Answer("level_get(oak)=7", "good point. 7")
    >>> reasons(one, other, (True, True))
    {'g': '=', 'p': 'A', 'j': '='}
    """
    faults = {
        "g": (not right[0], not right[1]),
        "p": (praises(one.said), praises(other.said)),
        "j": (boasts(one.said), boasts(other.said)),
    }
    return {line: "=" if a == b else "A" if a < b else "B" for line, (a, b) in faults.items()}


def verdict(letters: Mapping[str, str]) -> str:
    """The better on the whole: what is grounded, else what is the better in more lines."""
    if letters.get("g", "=") != "=":
        return letters["g"]
    for_a, for_b = (list(letters.values()).count(letter) for letter in "AB")
    return "=" if for_a == for_b else "A" if for_a > for_b else "B"


def unequal(
    group: Sequence[Rollout], worth: Sequence[float]
) -> Iterator[tuple[Comparison, Rollout, Rollout]]:
    """Attempts at one task of which one is worth more, it first, and what is shown of them; without
    those that code cannot read, or that say the same.

    Parameters
    ----------
    group : sequence of Rollout
    worth : sequence of float
        Of each.
    """
    readable = [
        (roll, value) for roll, value in zip(group, worth, strict=True) if well_formed(roll.episode)
    ]
    for (one, more), (other, less) in permutations(readable, 2):
        if more > less:
            users = one.episode.task.user
            shown = Comparison.of(users, one.episode.messages, other.episode.messages)
            if shown.first != shown.second:
                yield shown, one, other
