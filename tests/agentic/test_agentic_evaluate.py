# SPDX-License-Identifier: MIT
"""What is counted of episodes, and what a critic's judgement is worth."""

import dataclasses
import random

import pytest
import torch

from kimi_ops.agentic.critic import Critic
from kimi_ops.agentic.evaluate import Score, agreement, held_out_tasks, score, text_loss, worth_of
from kimi_ops.agentic.rollout import Rollout
from kimi_ops.agentic.teacher import play
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.chat import ByteTokenizer


def played(task, noise=None, style=False) -> Rollout:
    return Rollout(play(task, random.Random(1), noise, style))


class Fixed(Critic):
    """A critic that finds the shorter answer better, and the first place by some share."""

    def __init__(self, likes: float) -> None:
        super().__init__(ByteTokenizer())
        self.likes = likes

    def first_shares(self, model, comparisons):
        lengths = [(len(one.first.said), len(one.second.said)) for one in comparisons]
        return [0.5 + self.likes + 0.2 * ((a < b) - (a > b)) for a, b in lengths]


def test_several_tries_are_counted_by_task():
    one, other = held_out_tasks("words", 2, families=("lookup",))
    rolls = [played(one), played(one, "invented value"), played(other), played(other)]
    found = score(rolls, 2)
    assert found.success == {"lookup": 0.75}
    assert found.every == {"lookup": 0.5} and found.some == {"lookup": 1.0}
    told = held_out_tasks("words", 1, families=("tell",)) * 2
    found = score([played(told[0]), played(told[1], style=True)], 2)
    assert found.success == {"tell": 0.75} and found.every == {"tell": 0.0}
    assert found.some == {"tell": 1.0}


def test_accuracy_of_calls_and_of_calling():
    found = Score(calls=10, malformed=1, undeclared=2, invalid=1, triggered=(0.5, 1.0))
    assert found.schema_accuracy == pytest.approx(0.6)
    assert found.trigger_f1 == pytest.approx(2 / 3)
    assert Score().schema_accuracy == 1.0 and Score().trigger_f1 == 0.0


def test_agreement_of_a_critic_with_what_answers_are_worth():
    tasks = held_out_tasks("words", 4, families=("tell",))
    groups = [[played(task), played(task, style=True), played(task)] for task in tasks]
    assert {worth_of(roll) for group in groups for roll in group} == {0.5, 1.0}
    found = agreement(Fixed(0.1), None, groups)
    assert (found.accuracy, found.pairs) == (1.0, 8)  # either plain try against the other
    assert found.bias == pytest.approx(0.1)
    wrong = agreement(Fixed(-0.2), None, groups, lambda roll: -worth_of(roll))
    assert wrong.accuracy == 0.0 and wrong.bias == pytest.approx(-0.2)
    same = agreement(Fixed(0.1), None, groups, lambda roll: 1.0)
    assert (same.accuracy, same.bias, same.pairs) == (0.0, 0.0, 0)


def test_text_loss_is_that_of_held_out_text():
    config = dataclasses.replace(KimiK2Config.tiny(), vocab_size=256, rope_scaling=None)
    model = KimiK2(config)
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.train()
    loss = text_loss(model, windows=2, length=16)
    assert loss == pytest.approx(5.545, abs=1e-3) and model.training  # log 256
