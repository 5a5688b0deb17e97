# SPDX-License-Identifier: MIT
"""A small model, a critic that needs none, and tries that the teacher plays."""

import dataclasses
import random

import pytest

from kimi_ops.agentic.rollout import Rollout
from kimi_ops.agentic.teacher import play
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

EXAMPLE = ([*b"one two. one two."], [False] * 9 + [True] * 8)


def tiny(seed: int = 0) -> KimiK2:
    config = dataclasses.replace(
        KimiK2Config.tiny(), vocab_size=256, max_position_embeddings=1024, rope_scaling=None
    )
    model = KimiK2(config)
    model.init_weights(seed)
    return model


class Shortest:
    """A critic that likes few words, and teaches what it is told to."""

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.taught: list[tuple[str, list[float]]] = []

    def rewards_of(self, model, groups):
        self.judged += [group[0].episode.task.family for group in groups]
        return [self.rates([roll.episode.written for roll in group]) for group in groups]

    @staticmethod
    def rates(written):
        others = len(written) - 1
        return [
            sum((a < b) + 0.5 * (a == b) for b in written) / others - 0.5 / others for a in written
        ]

    def pairs(self, groups, rewards, rng, limit):
        self.taught += [
            (group[0].episode.task.family, some)
            for group, some in zip(groups, rewards, strict=True)
        ]
        return [EXAMPLE] * limit


def as_played(model, tokenizer, tasks, *, seed=0, **options):
    """What `roll_out` gives, of the teacher: it errs, or talks too much, at every other task."""
    rng, rolls = random.Random(seed), []
    for place, task in enumerate(tasks):
        noise = "invented value" if place % 2 else None
        episode = play(task, rng, noise, style=place % 3 == 0)
        ids, own = episode.chat.encode(tokenizer)
        rolls.append(Rollout(episode, ids, own))
    return rolls


def refused(settings: type, name: str, value: object, expected: str) -> None:
    """That settings do not take a value, and say what they expected and their default."""
    with pytest.raises(ValueError) as found:
        settings(**{name: value})
    assert str(found.value) == (
        f"{settings.__name__}: {name}: expected {expected}, got {value}; "
        f"the default is {getattr(settings(), name)}"
    )
