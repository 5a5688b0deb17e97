# SPDX-License-Identifier: MIT
"""What the critic's part in reinforcement is worth: the same stage under other judges.

refined    the critic as it learns from each step's verifiable tries: the command's own
frozen     the critic that the supervised stage left
shuffled   its verdicts, mixed up within a group: what remains is not the critic's doing
oracle     the true worth of "tell", which training never sees otherwise: the upper bound
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence

from kimi_ops.agentic.evaluate import told_value
from kimi_ops.agentic.progress import TELL
from kimi_ops.agentic.rl import Judges
from kimi_ops.agentic.rollout import Rollout
from kimi_ops.agentic.sft import Example
from kimi_ops.models.kimi_k2 import KimiK2

__all__ = ["ARMS", "Frozen", "Oracle", "Shuffled"]

Groups = Sequence[Sequence[Rollout]]


class Frozen:
    """A critic that learns nothing: the verdicts of the model as it is now."""

    def __init__(self, critic: Judges, model: KimiK2) -> None:
        self._critic, self._model = critic, copy.deepcopy(model)

    def rewards_of(self, model: KimiK2, groups: Groups) -> list[list[float]]:
        return self._critic.rewards_of(self._model, groups)

    def pairs(
        self,
        groups: Groups,
        rewards: Sequence[Sequence[float]],
        rng: random.Random,
        limit: int,
    ) -> list[Example]:
        return []


class Shuffled:
    """A critic whose verdicts fall on any of a group's tries."""

    def __init__(self, critic: Judges) -> None:
        self._critic = critic
        self.pairs = critic.pairs

    def rewards_of(self, model: KimiK2, groups: Groups) -> list[list[float]]:
        rates = self._critic.rewards_of(model, groups)
        return [self._mixed(group, some) for group, some in zip(groups, rates, strict=True)]

    @staticmethod
    def _mixed(group: Sequence[Rollout], rates: list[float]) -> list[float]:
        chance = random.Random(str([roll.ids for roll in group]))
        return chance.sample(rates, len(rates))


class Oracle:
    """The worth of "tell" itself."""

    def __init__(self, critic: Judges) -> None:
        self._critic = critic
        self.pairs = critic.pairs

    def rewards_of(self, model: KimiK2, groups: Groups) -> list[list[float]]:
        rates = self._critic.rewards_of(model, groups)
        return [
            [told_value(roll) for roll in group] if told(group) else some
            for group, some in zip(groups, rates, strict=True)
        ]


def told(group: Sequence[Rollout]) -> bool:
    return group[0].episode.task.family == TELL


ARMS: Mapping[str, Callable[[Judges, KimiK2], Judges]] = {
    "refined": lambda critic, model: critic,
    "frozen": Frozen,
    "shuffled": lambda critic, model: Shuffled(critic),
    "oracle": lambda critic, model: Oracle(critic),
}
