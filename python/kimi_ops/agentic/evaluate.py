# SPDX-License-Identifier: MIT
"""How well a model does what training never showed: by family and split; and what its critic is
worth.

What a "tell" is worth (`told_value`) is known here alone: nothing that trains imports this file.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kimi_ops.agentic.comparison import unequal
from kimi_ops.agentic.critic import Critic
from kimi_ops.agentic.judge import reward
from kimi_ops.agentic.learner import token_losses
from kimi_ops.agentic.rollout import Rollout, roll_out
from kimi_ops.agentic.specs import HELD_OUT_DOMAINS, Tool, is_held_out, repository
from kimi_ops.agentic.style import plain
from kimi_ops.agentic.synthesis import WRONG_TELL
from kimi_ops.agentic.tasks import FAMILIES, SYSTEM, Task, make_task
from kimi_ops.agentic.teacher import STYLE, play
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import Tokenizer
from kimi_ops.train.data import load_corpus

__all__ = [
    "SPLITS", "Agreement", "Score", "agreement", "evaluate", "held_out_tasks", "score", "scripted",
    "text_loss", "told_value",
]  # fmt: skip

SPLITS = ("trained", "words", "domains")  # of trained tools: trained, fresh words; fresh domains


@dataclass
class Score:
    """Of episodes of one split.

    Attributes
    ----------
    success : dict
        By family the share of rewards of 1; of "tell" the mean of `told_value`.
    every, some : dict
        By family the share of tasks that all tries did (pass^k), and that one at least did
        (pass@k); of "tell" with a value of 1.
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
    every: dict[str, float] = field(default_factory=dict)
    some: dict[str, float] = field(default_factory=dict)
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

    @property
    def schema_accuracy(self) -> float:
        """Share of calls that keep to a declaration."""
        bad = self.malformed + self.undeclared + self.invalid
        return 1 - bad / self.calls if self.calls else 1.0

    @property
    def trigger_f1(self) -> float:
        """Harmonic mean of both of `triggered`."""
        precision, recall = self.triggered
        return 2 * precision * recall / max(1e-9, precision + recall)


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
    grounded = value in re.findall(r"\w+", said[0])
    return grounded * (1.0 if plain(said[0]) else 0.5)


def split_tools(split: str, specs: int = 2000) -> list[Tool]:
    """The tools of a split's tasks.

    Raises
    ------
    ValueError
        A split that there is not.
    """
    if split not in SPLITS:
        raise ValueError(
            f"agentic: split: expected {' | '.join(SPLITS)}, got {split!r}; name one of them"
        )
    tools = repository(specs)
    if split == "domains":
        return [tool for tool in tools if tool.semantics.table in HELD_OUT_DOMAINS]
    return [tool for tool in tools if not is_held_out(tool)]


def held_out_tasks(
    split: str,
    count: int,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    declared: int = 2,
    system: str = SYSTEM,
) -> list[Task]:
    """The same tasks for everybody: `count` of each family."""
    tools = split_tools(split)
    rng = random.Random(f"evaluate {split} {declared}")
    tasks = [
        make_task(family, tools, rng, fresh=split != "trained", declared=declared)
        for family in families
        for _ in range(count)
    ]
    return [dataclasses.replace(task, system=system) for task in tasks]


def scripted(count: int, *, tries: int = 6) -> list[list[Rollout]]:
    """The teacher's attempts at "tell" with held-out words, as noisy as its data: a critic's exam
    that is the same for everybody, with more pairs of unequal worth than a good policy's own tries.

    Parameters
    ----------
    count, tries : int
        Tasks, and attempts at each.
    """
    rng, groups = random.Random("scripted"), []
    for task in held_out_tasks("words", count, families=("tell",)):
        noises = ["invented value" if rng.random() < WRONG_TELL else None for _ in range(tries)]
        groups.append([Rollout(play(task, rng, one, rng.random() < STYLE)) for one in noises])
    return groups


def evaluate(
    model: KimiK2,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    tries: int = 1,
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
    tries : int
        At each task; more than one ask for a temperature.
    temperature, seed, rows
        As of `roll_out`.

    Raises
    ------
    ValueError
        Several tries without a temperature: they would be one.
    """
    if tries > 1 and temperature == 0:
        raise ValueError(
            f"evaluate: temperature: expected a number above 0 for {tries} tries, which would all "
            "be the same, got 0; pass 1.0, or one try"
        )
    played = [task for task in tasks for _ in range(tries)]
    rolls = roll_out(model, tokenizer, played, temperature=temperature, seed=seed, rows=rows)
    return score(rolls, tries)


def worth_of(roll: Rollout) -> float:
    """1 where an episode did its task, else 0; of a "tell" `told_value`."""
    if roll.episode.task.family == "tell":
        return told_value(roll)
    return float(reward(roll.episode) == 1.0)


def score(rolls: Sequence[Rollout], tries: int = 1) -> Score:
    """Of played episodes, so many in a row of the same task.

    Raises
    ------
    ValueError
        Episodes that do not come so.
    """
    tasks_of = [roll.episode.task for roll in rolls]
    if len(rolls) % tries or any(
        task is not tasks_of[place - place % tries] for place, task in enumerate(tasks_of)
    ):
        raise ValueError(
            f"score: rolls: expected {tries} of each task in a row, got {len(rolls)} otherwise; "
            "play each task so often, or pass how often it was"
        )
    found = Score()
    worth: dict[str, list[float]] = {}
    tasks, every, some = Counter[str](), Counter[str](), Counter[str]()
    hits = called = wanted = 0
    for start in range(0, len(rolls), tries):
        group = rolls[start : start + tries]
        family = group[0].episode.task.family
        values = [worth_of(roll) for roll in group]
        worth.setdefault(family, []).extend(values)
        tasks[family] += 1
        every[family] += min(values) == 1.0
        some[family] += max(values) == 1.0
    for roll in rolls:
        episode, task = roll.episode, roll.episode.task
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
    found.every = {family: every[family] / count for family, count in tasks.items()}
    found.some = {family: some[family] / count for family, count in tasks.items()}
    found.triggered = hits / max(1, called), hits / max(1, wanted)
    return found


@dataclass(frozen=True)
class Agreement:
    """Of a critic with what answers are worth.

    Attributes
    ----------
    accuracy : float
        Share of pairs of unequal worth of which the critic, over both orders, prefers the better.
    bias : float
        Mean probability of the first place, less 1/2.
    pairs : int
        Of tries that say something different.
    """

    accuracy: float
    bias: float
    pairs: int


def agreement(
    critic: Critic,
    model: KimiK2,
    groups: Sequence[Sequence[Rollout]],
    worth: Callable[[Rollout], float] = worth_of,
) -> Agreement:
    """How often a critic prefers the better of two tries at a task.

    Parameters
    ----------
    critic : Critic
    model : KimiK2
    groups : sequence of sequences of Rollout
        Tries at one task each.
    worth : callable
        What a try is worth.
    """
    pairs = Counter(
        comparison
        for group in groups
        for comparison, *_ in unequal(group, [worth(roll) for roll in group])
    )
    shown = list(pairs)
    shares = critic.first_shares(model, [*shown, *(one.swapped for one in shown)])
    right = liked = 0.0
    for count, first, second in zip(
        pairs.values(), shares[: len(shown)], shares[len(shown) :], strict=True
    ):
        right += count * ((first > second) + 0.5 * (first == second))
        liked += count * (first + second - 1) / 2
    total = max(1, pairs.total())
    return Agreement(right / total, liked / total, pairs.total())


@torch.no_grad()
def text_loss(model: KimiK2, *, windows: int = 64, length: int = 256) -> float:
    """Nats a byte on text that nobody trains on, Python's own sources: what a stage forgets."""
    text = load_corpus(None, window=length).validation
    starts = random.Random("text").sample(range(len(text) - length), windows)
    ids = torch.stack(
        [torch.from_numpy(text[at : at + length + 1].astype("int64")) for at in starts]
    )
    ids = ids.to(model.lm_head.weight.device)
    was_training = model.training
    model.eval()
    try:
        return float(token_losses(model(ids[:, :-1]), ids).mean())
    finally:
        model.train(was_training)
