# SPDX-License-Identifier: MIT
"""What a step of reinforcement found, as numbers to watch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.rollout import Rollout
from kimi_ops.agentic.tasks import Task

__all__ = ["TELL", "Group", "Learnt", "RlStep", "agreement"]

TELL = "tell"  # the family that only the critic rewards


@dataclass
class Group:
    """Tries at one prompt.

    Attributes
    ----------
    rolls : list of Rollout
    rewards : list of float
    """

    rolls: list[Rollout]
    rewards: list[float]

    @property
    def task(self) -> Task:
        return self.rolls[0].episode.task

    @property
    def episodes(self) -> list[Episode]:
        return [roll.episode for roll in self.rolls]

    @property
    def told(self) -> bool:
        return self.task.family == TELL

    @property
    def unequal(self) -> bool:
        """Whether one try is better than another; otherwise the group only holds the policy where
        it is, and is left out."""
        return len(set(self.rewards)) > 1

    @property
    def success(self) -> float:
        return self.rewards.count(1.0) / len(self.rewards)


@dataclass
class Learnt:
    """What the updates of a step found.

    Attributes
    ----------
    entropy : float or None
        Nats an id, of what the answers were drawn from; None where there was no update, as below.
    squared : list of float
        Mean s^2 of the answers of each update.
    largest : float or None
        Attention logit.
    loss : float or None
        Of the last update.
    """

    entropy: float | None = None
    squared: list[float] = field(default_factory=list)
    largest: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class RlStep:
    """A line of the metrics.

    Attributes
    ----------
    step : int
        From 1.
    reward, success : float
        Mean of the verifiable tries; share of them with a reward of 1.
    told : float
        Mean reward of "tell": 1/2 but for the budget, as the critic compares tries with each other.
    families : dict
        Success by family, running.
    malformed : float
        Share of the calls.
    written, budget : float
        Mean bytes that the model wrote in an episode, and the mean share of its budget.
    dropped : float
        Share of groups whose rewards are equal.
    agreement : float or None
        Of the critic with the rewards of a verifiable group; None where no group is unequal.
    entropy, squared, largest, loss : float or None
        Of `Learnt`; `squared` is the mean of the updates.
    """

    step: int
    reward: float
    success: float
    told: float
    families: dict[str, float]
    malformed: float
    written: float
    budget: float
    dropped: float
    agreement: float | None
    entropy: float | None
    squared: float | None
    largest: float | None
    loss: float | None

    @classmethod
    def of(
        cls,
        step: int,
        groups: Sequence[Group],
        families: Mapping[str, float],
        agreed: float | None,
        learnt: Learnt,
    ) -> RlStep:
        """Of a step's groups and updates."""
        known = [group for group in groups if not group.told]
        told = [one for group in groups if group.told for one in group.rewards]
        episodes = [one for group in groups for one in group.episodes]
        calls = [call for one in episodes for turn in one.turns for call in turn.calls]
        return cls(
            step,
            reward=_mean([one for group in known for one in group.rewards]),
            success=_mean([group.success for group in known]),
            told=_mean(told),
            families=dict(families),
            malformed=_mean([call.malformed is not None for call in calls]),
            written=_mean([one.written for one in episodes]),
            budget=_mean([one.written / one.task.rubric.budget for one in episodes]),
            dropped=_mean([not group.unequal for group in groups]),
            agreement=agreed,
            entropy=learnt.entropy,
            squared=_mean(learnt.squared) if learnt.squared else None,
            largest=learnt.largest,
            loss=learnt.loss,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def agreement(rates: Sequence[float], rewards: Sequence[float]) -> float:
    """Share of pairs of unequal reward that rates put in the same order; equal rates count half.

    Examples
    --------
    >>> from kimi_ops.agentic.progress import agreement
    >>> agreement([0.9, 0.4, 0.4], [1.0, 1.0, 0.0])
    0.75
    """
    found = [
        (high > low) + 0.5 * (high == low)
        for high, better in zip(rates, rewards, strict=True)
        for low, worse in zip(rates, rewards, strict=True)
        if better > worse
    ]
    return _mean(found)
