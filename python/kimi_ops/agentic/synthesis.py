# SPDX-License-Identifier: MIT
"""The pipeline: specs, tasks, attempts of the teacher, the judge's filter, no shape too often.

Attempt number n of a seed is always the same, whatever came before it: a run that was broken off
goes on behind its last line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.judge import judge
from kimi_ops.agentic.preferences import Preference, prefer
from kimi_ops.agentic.specs import Tool, is_held_out, repository
from kimi_ops.agentic.tasks import PLAIN, make_task
from kimi_ops.agentic.teacher import STYLE, noise_of, play

__all__ = ["Attempt", "Funnel", "attempt", "read_attempts", "synthesise", "training_tools"]

MIXTURE = {  # of 100 attempts
    "lookup": 18, "write": 10, "chain": 22, "none": 6,
    "fault": 12, "ask": 8, "pair": 14, "tell": 10,
}  # fmt: skip
PLAIN_SHARE = 0.25  # of verifiable tasks, whose system asks for plain answers
WRONG_TELL = 0.1  # of "tell", answers with a wrong value, which nobody filters out
SHAPE_CAP, SHAPE_LEAST = 0.02, 20  # of the attempts may have one shape, or so many


@dataclass(frozen=True)
class Attempt:
    """An attempt and what came of it.

    Attributes
    ----------
    number : int
    episode : Episode
    noise : str or None
        The teacher's error; the judge does not see it.
    reasons : tuple of str
        Of the judge; none where it keeps the attempt.
    pair : Preference or None
        Two more attempts at the task, for a critic.
    """

    number: int
    episode: Episode
    noise: str | None
    reasons: tuple[str, ...]
    pair: Preference | None = None

    @property
    def line(self) -> dict[str, Any]:
        """As it is written: usable by anybody's trainer."""
        task = self.episode.task
        return {
            "number": self.number,
            "family": task.family,
            "messages": self.episode.messages,
            "tools": [tool.declaration for tool in task.tools],
            "rubric": dataclasses.asdict(task.rubric),
            "noise": self.noise,
            "reasons": list(self.reasons),
            "pair": self.pair and self.pair.line,
        }


def training_tools(count: int = 2000, seed: int = 0) -> list[Tool]:
    """The repository without what is held out."""
    return [tool for tool in repository(count, seed) if not is_held_out(tool)]


def attempt(tools: Sequence[Tool], seed: int, number: int, *, fresh: bool = False) -> Attempt:
    """Attempt `number` of a seed."""
    rng = random.Random(f"attempt {seed} {number}")
    family = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    task = make_task(family, tools, rng, fresh=fresh, declared=rng.choice((1, 2, 2, 3)))
    hidden = family == "tell"
    if not hidden and rng.random() < PLAIN_SHARE:
        task = dataclasses.replace(task, system=PLAIN)
    noise = noise_of(task, rng)
    if hidden and noise is None and rng.random() < WRONG_TELL:
        noise = "invented value"
    style = (hidden or task.system == PLAIN) and rng.random() < STYLE
    episode = play(task, rng, noise, style)
    pair = prefer(task, random.Random(f"pair {seed} {number}"))
    return Attempt(number, episode, noise, judge(episode).reasons, pair)


class Funnel:
    """Counts of what came and went, by family.

    Attributes
    ----------
    attempts, kept, crowded : Counter
        By family; `crowded`: of a shape that there was often enough.
    reasons : Counter
        By family and the judge's first reason.
    pairs : Counter
        By family, for a critic.
    missed, false : Counter
        By kind of error: kept although the teacher erred; rejected although it did not.
    """

    def __init__(self) -> None:
        self.attempts, self.kept, self.crowded = Counter[str](), Counter[str](), Counter[str]()
        self.pairs, self.reasons = Counter[str](), Counter[tuple[str, str]]()
        self.errors, self.missed, self.false = Counter[str](), Counter[str](), Counter[str]()

    def count(self, one: Attempt) -> None:
        family = one.episode.task.family
        self.attempts[family] += 1
        self.pairs[family] += one.pair is not None
        if one.noise:
            self.errors[one.noise] += 1
        if one.reasons:
            self.reasons[family, one.reasons[0]] += 1
            self.false[family] += one.noise is None
        elif one.noise:
            self.missed[one.noise] += 1


def shape(episode: Episode) -> str:
    """A transcript with everything that a word stands for left out."""
    task = episode.task
    own = {tool.name for tool in task.tools} | {tool.domain.thing for tool in task.tools}
    for tool in task.tools:
        own |= set(tool.parameters["properties"]) | {tool.semantics.column, tool.semantics.table}
    for tables in (task.world.tables, episode.world.tables):
        for table in tables.values():
            own |= set(table) | {value for row in table.values() for value in row.values()}
    own |= {str(v) for call in task.rubric.calls for v in call.arguments.values()}
    text = episode.chat.text.partition("<|im_user|>")[2]
    return re.sub(r"[a-z_]+|\d+", lambda m: "#" if m.group() in own else m.group(), text)


def synthesise(
    path: Path, attempts: int = 8000, seed: int = 0, *, specs: int = 2000
) -> Iterator[Funnel]:
    """Write attempts to a JSONL file, kept and rejected ones; yields the counts after each.

    Parameters
    ----------
    path : Path
        A file that has the beginning of the same attempts is continued.
    attempts, seed : int
    specs : int
        Tools in the repository.
    """
    tools, funnel = training_tools(specs, seed), Funnel()
    shapes, cap = Counter[str](), max(SHAPE_LEAST, round(SHAPE_CAP * attempts))
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _whole_lines(path)
    with path.open("r+b" if done else "wb") as file:
        file.seek(sum(len(line) for line in done))
        file.truncate()
        for number in range(attempts):
            one = attempt(tools, seed, number)
            funnel.count(one)
            if not one.reasons:
                form = shape(one.episode)
                shapes[form] += 1
                if shapes[form] > cap:
                    funnel.crowded[one.episode.task.family] += 1
                    one = dataclasses.replace(one, reasons=("crowded",))
                else:
                    funnel.kept[one.episode.task.family] += 1
            line = json.dumps(one.line, ensure_ascii=False).encode() + b"\n"
            if number >= len(done):
                file.write(line)
            elif done[number] != line:
                raise ValueError(
                    f"synthesise: {path}: expected the attempts of seed {seed}, got others from "
                    f"line {number + 1} on; choose another folder"
                )
            yield funnel
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
