# SPDX-License-Identifier: MIT
"""How well a model does what training never showed: by family and split."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from kimi_ops.agentic.judge import plain, reward
from kimi_ops.agentic.rollout import Rollout, roll_out
from kimi_ops.agentic.specs import HELD_OUT_DOMAINS, Tool, is_held_out, repository
from kimi_ops.agentic.tasks import FAMILIES, Task, make_task
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import Tokenizer

__all__ = ["SPLITS", "Score", "evaluate", "held_out_tasks", "told_value"]

SPLITS = ("trained", "words", "domains")  # of trained tools: trained, fresh words; fresh domains


@dataclass
class Score:
    """Of episodes of one split.

    Attributes
    ----------
    success : dict
        By family the share of rewards of 1; of "tell" the mean of `told_value`.
    calls, malformed, undeclared, invalid : int
        Calls; those that nobody can read; of a tool that was not declared; against its schema.
    in_budget : float
        Share of episodes.
    written : float
        Mean bytes of an episode.
    triggered : tuple of float
        Precision and recall of calling a tool at all.
    """

    success: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    malformed: int = 0
    undeclared: int = 0
    invalid: int = 0
    in_budget: float = 0.0
    written: float = 0.0
    triggered: tuple[float, float] = (0.0, 0.0)

    @property
    def verifiable(self) -> float:
        """Mean success of the families whose end can be verified."""
        found = [share for family, share in self.success.items() if family != "tell"]
        return sum(found) / max(1, len(found))


def told_value(roll: Rollout) -> float:
    """The hidden worth of a "tell": whether the value that the tool gave stands in the answer,
    times 1 - 0.5 for praise or justification."""
    episode = roll.episode
    calls = [(c.tool, dict(c.arguments)) for c in episode.task.rubric.calls]
    made = [(c.name, c.arguments) for turn in episode.turns for c in turn.calls]
    said = [turn.content for turn in episode.turns if not turn.calls]
    if not episode.finished or calls[0] not in made or len(said) != 1:
        return 0.0
    world = episode.task.world.copy()
    value = world.call(calls[0][0], calls[0][1])
    grounded = value in said[0].replace(",", " ").replace(".", " ").split()
    return grounded * (1.0 if plain(said[0]) else 0.5)


def split_tools(split: str, specs: int = 2000) -> list[Tool]:
    """The tools of a split's tasks."""
    tools = repository(specs)
    if split == "domains":
        return [tool for tool in tools if tool.semantics.table in HELD_OUT_DOMAINS]
    return [tool for tool in tools if not is_held_out(tool)]


def held_out_tasks(
    split: str, count: int, *, families: Sequence[str] = tuple(FAMILIES), declared: int = 2
) -> list[Task]:
    """The same tasks for everybody: `count` of each family."""
    tools = split_tools(split)
    rng = random.Random(f"evaluate {split} {declared}")
    return [
        make_task(family, tools, rng, fresh=split != "trained", declared=declared)
        for family in families
        for _ in range(count)
    ]


def evaluate(
    model: KimiK2,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = 96,
) -> Score:
    """Play the tasks and count.

    Parameters
    ----------
    model : KimiK2
    tokenizer : Tokenizer
    tasks : sequence of Task
    temperature, seed, rows
        As of `roll_out`.
    """
    rolls = roll_out(model, tokenizer, tasks, temperature=temperature, seed=seed, rows=rows)
    return score(rolls)


def score(rolls: Sequence[Rollout]) -> Score:
    """Of played episodes."""
    found = Score()
    worth: dict[str, list[float]] = {}
    hits = called = wanted = 0
    for roll in rolls:
        episode, task = roll.episode, roll.episode.task
        value = told_value(roll) if task.family == "tell" else float(reward(episode) == 1.0)
        worth.setdefault(task.family, []).append(value)
        names = {tool.name for tool in task.tools}
        calls = [call for turn in episode.turns for call in turn.calls]
        found.calls += len(calls)
        found.malformed += sum(call.malformed is not None for call in calls)
        readable = [call for call in calls if call.malformed is None]
        found.undeclared += sum(call.name not in names for call in readable)
        found.invalid += sum(call.name in names and not call.valid for call in readable)
        found.in_budget += (episode.written <= task.rubric.budget) / len(rolls)
        found.written += episode.written / len(rolls)
        called += bool(calls)
        wanted += bool(task.rubric.calls)
        hits += bool(calls) and bool(task.rubric.calls)
    found.success = {family: sum(values) / len(values) for family, values in worth.items()}
    found.triggered = hits / max(1, called), hits / max(1, wanted)
    return found
