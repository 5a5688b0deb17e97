# SPDX-License-Identifier: MIT
"""The judge: a transcript against its rubric. It never sees the teacher's plan or its errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.style import plain
from kimi_ops.agentic.tasks import PLAIN

__all__ = ["OVER_BUDGET", "Verdict", "fulfilled", "judge", "reward", "well_formed"]

OVER_BUDGET = -0.5


@dataclass(frozen=True)
class Verdict:
    """
    Attributes
    ----------
    reasons : tuple of str
        What is wrong, in the order of the checks; none where the task was done.
    """

    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        return not self.reasons


def judge(episode: Episode) -> Verdict:
    """Whether an episode did its task as its rubric expects: the end state, what was answered and
    asked, the calls on the way, the budget. Style is not judged; `reward` does.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.judge import judge
    >>> from kimi_ops.agentic.specs import DOMAINS, base_tools
    >>> from kimi_ops.agentic.tasks import make_task
    >>> from kimi_ops.agentic.teacher import play
    >>> rng = random.Random(0)
    >>> task = make_task("write", base_tools(DOMAINS[0]), rng, fresh=False)
    >>> judge(play(task, rng)).kept, judge(play(task, rng, "forgotten step")).reasons[0]
    (True, 'end state')
    """
    rubric = episode.task.rubric
    calls = [call for turn in episode.turns for call in turn.calls]
    made = [(call.name, call.arguments) for call in calls]
    wrong = {
        "not finished": not episode.finished or not all(turn.ended for turn in episode.turns),
        "end state": episode.world.digest() != rubric.goal,
        "malformed call": any(call.malformed for call in calls),
        "call beside the declaration": any(call.complaints for call in calls),
        "calls": not _within(((c.tool, dict(c.arguments)) for c in rubric.calls), made),
        "answer": not _answered(episode),
        "turns": len(_said(episode)) != rubric.questions + 1,
        "budget": episode.written > rubric.budget,
    }
    return Verdict(tuple(reason for reason, found in wrong.items() if found))


def reward(episode: Episode) -> float:
    """Of a task whose end can be verified: 1 or 0, `OVER_BUDGET` where too much was written.

    That it was fulfilled, and plain answers where the system asks for them. How the end was reached
    does not count.
    """
    task = episode.task
    if episode.written > task.rubric.budget:
        return OVER_BUDGET
    asked_plain = task.system == PLAIN
    return float(fulfilled(episode) and not (asked_plain and not all(map(plain, _said(episode)))))


def fulfilled(episode: Episode) -> bool:
    """The end state, the answers, and no call beside the declaration; whatever the style."""
    return (
        episode.finished
        and episode.world.digest() == episode.task.rubric.goal
        and all(call.valid for turn in episode.turns for call in turn.calls)
        and _answered(episode)
    )


def well_formed(episode: Episode) -> bool:
    """Whether code can read all of it: turns that ended, calls of the declaration, an answer."""
    return (
        episode.finished
        and all(turn.ended for turn in episode.turns)
        and all(call.valid for turn in episode.turns for call in turn.calls)
        and any(_said(episode))
    )


def _said(episode: Episode) -> list[str]:
    """What the assistant ended its turns with."""
    return [turn.content for turn in episode.turns if not turn.calls]


def _answered(episode: Episode) -> bool:
    """Whether the outputs stand in the answers, as whole words, one after the other."""
    text, place = "\n".join(_said(episode)), 0
    for output in episode.task.rubric.outputs:
        found = re.compile(rf"(?<!\w){re.escape(output)}(?!\w)").search(text, place)
        if found is None:
            return False
        place = found.end()
    return True


def _within(wanted: Iterable[object], made: Sequence[object]) -> bool:
    """Whether all of one sequence come in the other, in order."""
    left = iter(made)
    return all(any(one == other for other in left) for one in wanted)
