# SPDX-License-Identifier: MIT
"""What is counted of episodes, and what a critic's judgement is worth."""

import dataclasses
import random

import pytest
import torch

from kimi_ops.agentic import evaluate as evaluation
from kimi_ops.agentic.critic import Critic
from kimi_ops.agentic.evaluate import (
    SPLITS,
    Score,
    agreement,
    evaluate,
    held_out_tasks,
    score,
    scripted,
    split_tools,
    text_loss,
    told_value,
    worth_of,
)
from kimi_ops.agentic.rollout import Rollout
from kimi_ops.agentic.specs import HELD_OUT_DOMAINS, is_held_out
from kimi_ops.agentic.tasks import Call
from kimi_ops.agentic.teacher import play
from kimi_ops.agentic.words import held_out
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import ByteTokenizer
from kimi_ops.train.data import load_corpus
from tests.agentic.agentic_parts import tiny


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
    praised = score([played(told[0], style=True)] * 2, 2)
    assert praised.success == {"tell": 0.5} and praised.some == {"tell": 0.0}


def test_tries_that_do_not_come_in_a_row_are_refused():
    one, other = held_out_tasks("words", 2, families=("lookup",))
    for tasks in ([one, one, other], [one, other, one, other]):
        with pytest.raises(ValueError, match="score: rolls: expected 2 of each task in a row"):
            score([played(task) for task in tasks], 2)
    with pytest.raises(ValueError, match="expected a number above 0 for 2 tries.*got 0; pass 1.0"):
        evaluate(tiny(), ByteTokenizer(), [one], tries=2)
    with pytest.raises(ValueError, match="split: expected trained | words | domains, got 'word'"):
        held_out_tasks("word", 1)


def test_tasks_are_tried_as_they_are_asked_for(monkeypatch):
    asked = []

    def recorded(model, tokenizer, tasks, **options):
        asked.append((tasks, options))
        return [played(task, "invented value" if n % 3 else None) for n, task in enumerate(tasks)]

    monkeypatch.setattr(evaluation, "roll_out", recorded)
    one, other = held_out_tasks("words", 2, families=("lookup",))
    options = {"temperature": 0.5, "seed": 7, "rows": 9}
    found = evaluate(None, ByteTokenizer(), [one, other], tries=3, **options)
    assert asked == [([one] * 3 + [other] * 3, options)]
    assert found.success == {"lookup": pytest.approx(1 / 3)} and found.some == {"lookup": 1.0}
    evaluate(None, ByteTokenizer(), [one])
    assert asked[1] == ([one], {"temperature": 0.0, "seed": 0, "rows": 96})


def test_tasks_of_a_split_are_its_own():
    """Always the same, with words and tools that training has not, or has."""
    families = ("lookup", "write")
    found = {split: held_out_tasks(split, 20, families=families) for split in SPLITS}
    for split, tasks in found.items():
        assert [task.family for task in tasks] == ["lookup"] * 20 + ["write"] * 20
        again = held_out_tasks(split, 20, families=families)
        assert [task.user for task in again] == [task.user for task in tasks]
        assert {len(task.tools) for task in tasks} == {2}
        others = held_out_tasks(split, 20, families=families, declared=3)
        assert {len(task.tools) for task in others} == {3}
        said = {w for task in tasks for call in task.rubric.calls for w in call.arguments.values()}
        fresh = {word for word in said if word.isalpha() and held_out(word)}
        assert (not fresh) if split == "trained" else len(fresh) > 20
        far = {t.semantics.table for task in tasks for t in task.tools} & set(HELD_OUT_DOMAINS)
        assert far == (set(HELD_OUT_DOMAINS) if split == "domains" else set())
        held = [is_held_out(tool) for tool in split_tools(split)]
        assert not any(held) if split != "domains" else all(held)
    heard = [{task.user for task in tasks} for tasks in found.values()]
    assert not heard[0] & heard[1]
    assert len(split_tools("trained", 500)) < len(split_tools("trained")) <= 2000


def test_a_told_value_is_worth_what_the_tool_gave_in_plain_words():
    (task,) = held_out_tasks("words", 1, families=("tell",))
    value = str(task.plan[-1]).split()[-1]
    assert told_value(played(task)) == 1.0 and told_value(played(task, style=True)) == 0.5

    def saying(*plan):
        roll = played(dataclasses.replace(task, plan=plan))
        return told_value(roll)

    call, strange = task.plan[0], Call("nothing", {})
    for said in (f"it is {value}.", f"it is {value}, I read", f"{value}!", value):
        assert saying(call, said) == 1.0
    for said in (f"it is {value}1", "it is not known", f"it is x{value}"):
        assert saying(call, said) == 0.0
    assert saying(value) == saying((strange,), value) == 0.0  # nobody looked it up
    assert saying(call, f"how wise. {value}") == 0.5 and saying(call, "how wise.") == 0.0
    roll = played(task)
    roll.episode.turns.append(roll.episode.turns[-1])  # and again
    assert told_value(roll) == 0.0
    roll = played(task)
    roll.episode.finished = False
    assert told_value(roll) == 0.0


def test_what_is_counted_of_calls():
    """One call of each kind that is wrong, of an episode each; and one that was not to be made."""
    tasks = held_out_tasks("words", 9, families=("lookup", "none"))
    lookup = next(task for task in tasks if any(call.arguments for call in task.rubric.calls))
    none, (call,) = tasks[-1], lookup.rubric.calls
    answer = lookup.plan[-1]
    plans = [
        ((call,), answer),
        ((Call("nothing", call.arguments),), answer),
        ((Call(call.tool, {"no_field": "x"}),), answer),
        (answer,),
    ]
    rolls = [played(dataclasses.replace(lookup, plan=plan)) for plan in plans]
    rolls.append(played(lookup, "malformed call"))
    rolls.append(played(none))
    rolls.append(played(dataclasses.replace(none, plan=((Call("nothing", {}),), *none.plan))))
    budget = rolls[0].episode.written
    for roll, more in ((rolls[0], 0), (rolls[1], -1)):
        task = roll.episode.task
        rubric = dataclasses.replace(task.rubric, budget=roll.episode.written + more)
        roll.episode.task = dataclasses.replace(task, rubric=rubric)
    found = score(rolls)
    counts = (found.calls, found.malformed, found.undeclared, found.invalid)
    assert counts == (5, 1, 2, 1) and found.schema_accuracy == pytest.approx(1 / 5)
    assert found.triggered == (4 / 5, 4 / 5)
    inside = [roll.episode.written <= roll.episode.task.rubric.budget for roll in rolls]
    assert inside[:2] == [True, False] and found.in_budget == pytest.approx(sum(inside) / 7)
    assert found.written == pytest.approx(sum(roll.episode.written for roll in rolls) / 7)
    assert budget == rolls[0].episode.task.rubric.budget
    assert found.success == {"lookup": pytest.approx(2 / 5), "none": 0.5}  # one is a guess
    assert found.verifiable == pytest.approx(0.45)
    told = score([*rolls, played(held_out_tasks("words", 1, families=("tell",))[0])])
    assert told.success["tell"] == 1.0 and told.verifiable == pytest.approx(0.45)
    missed = score([rolls[3], rolls[5], rolls[6]])  # a call that was wanted, one that was not
    assert missed.triggered == (0.0, 0.0)
    apart = score([rolls[0], rolls[6], played(lookup), played(lookup)])
    assert apart.triggered == (3 / 4, 1.0)


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


def test_scripted_attempts_are_the_same_for_all_and_as_noisy_as_the_data():
    groups = scripted(40)
    assert [len(group) for group in groups] == [6] * 40
    again = scripted(40)
    assert [[r.episode.messages for r in group] for group in groups] == [
        [r.episode.messages for r in group] for group in again
    ]
    for group in groups:
        assert {roll.episode.task.user for roll in group} == {group[0].episode.task.user}
    worth = [worth_of(roll) for group in groups for roll in group]
    assert set(worth) == {0.0, 0.5, 1.0}
    assert 0.05 < worth.count(0.0) / len(worth) < 0.15  # 10 % say a wrong value
    assert 0.25 < worth.count(0.5) / len(worth) < 0.4  # 35 % of the others praise or boast
    found = agreement(Fixed(0.0), None, groups)
    assert found.pairs > 200


def test_text_loss_is_that_of_held_out_text(monkeypatch):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.train()
    loss = text_loss(model, windows=2, length=16)
    assert loss == pytest.approx(5.545, abs=1e-3) and model.training  # log 256
    whole, seen = load_corpus(None, window=16), []
    monkeypatch.setattr(
        KimiK2,
        "forward",
        lambda self, ids: seen.append((ids, self.training)) or (torch.zeros(*ids.shape, 256)),
    )
    text_loss(model, windows=5, length=16)
    ((ids, training),) = seen
    assert ids.shape == (5, 16) and not training
    assert all(bytes(row.tolist()) in whole.validation.tobytes() for row in ids)
