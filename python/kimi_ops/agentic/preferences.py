# SPDX-License-Identifier: MIT
"""Two more attempts at a task, of which code can tell the better: what a critic learns from.

Either one of them errs, or both are right and one praises the user or itself although the system
asks for plain answers. A "tell" has no pair: nobody here knows what it is worth.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.judge import judge, reward, well_formed
from kimi_ops.agentic.tasks import PLAIN, Task
from kimi_ops.agentic.teacher import STYLE, play, possible

__all__ = ["Preference", "prefer"]

SHARES = {True: 0.7, False: 0.3}  # of the tasks, by whether their system asks for plain answers
STYLE_PAIRS = 0.7  # of the former's pairs
SENTENCES = ("{}", "{}", "the {column} is {}", "the {column} is {}", "it is {}")
_WEIGHTS = {"invented value": 3, "letter off": 1, "wrong tool": 1, "forgotten step": 1}


@dataclass(frozen=True)
class Preference:
    """
    Attributes
    ----------
    better, worse : Episode
    right : bool
        Whether the worse one did the task as well, so that style is what is wrong with it.
    """

    better: Episode
    worse: Episode
    right: bool

    @property
    def line(self) -> dict[str, Any]:
        return {
            "better": self.better.messages,
            "worse": self.worse.messages,
            "right": self.right,
        }


def prefer(task: Task, rng: random.Random) -> Preference | None:
    """A pair of attempts at a task; None where there is to be none, or code cannot tell.

    Parameters
    ----------
    task : Task
    rng : random.Random

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.evaluate import split_tools
    >>> from kimi_ops.agentic.judge import reward
    >>> from kimi_ops.agentic.preferences import prefer
    >>> from kimi_ops.agentic.tasks import make_task
    >>> rng, tools = random.Random(0), split_tools("trained")
    >>> tasks = [make_task("lookup", tools, rng, fresh=False) for _ in range(20)]
    >>> pairs = [pair for pair in (prefer(task, rng) for task in tasks) if pair is not None]
    >>> len(pairs) > 2 and all(reward(pair.better) == 1.0 for pair in pairs)
    True
    """
    plainly = task.system == PLAIN
    if task.family == "tell" or rng.random() >= SHARES[plainly]:
        return None
    task = _in_a_sentence(task, rng)
    if plainly and rng.random() < STYLE_PAIRS:
        better, worse = play(task, rng), play(task, rng, style=True)
    else:
        kinds = [kind for kind in possible(task) if kind in _WEIGHTS]
        kind = rng.choices(kinds, [_WEIGHTS[kind] for kind in kinds])[0]
        styled = [not plainly and rng.random() < STYLE for _ in range(2)]
        better, worse = play(task, rng, style=styled[0]), play(task, rng, kind, styled[1])
    wrong = set(judge(worse).reasons)
    told = judge(better).kept and reward(better) == 1.0 and (wrong or reward(worse) < 1.0)
    if not told or not well_formed(worse):
        return None
    return Preference(better, worse, right=wrong <= {"budget"})


def _in_a_sentence(task: Task, rng: random.Random) -> Task:
    """The last answer as it is, or told in words."""
    said = task.plan[-1]
    assert isinstance(said, str)
    if not task.rubric.calls:
        return task
    called = task.rubric.calls[-1].tool
    meaning = next(tool.semantics for tool in task.tools if tool.name == called)
    column = meaning.column or "answer"
    told = rng.choice(SENTENCES).format(said, column=column)
    return dataclasses.replace(task, plan=(*task.plan[:-1], told))
