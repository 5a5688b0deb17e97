# SPDX-License-Identifier: MIT
"""Episodes in lock step: what a model says one by one, it says in a batch."""

import dataclasses
import random
from collections import deque

import pytest
import torch

from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.evaluate import evaluate, held_out_tasks, score, told_value
from kimi_ops.agentic.rollout import Rollout, parts_of, roll_out
from kimi_ops.agentic.teacher import play
from kimi_ops.agentic.words import held_out
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.attention import LatentCache
from kimi_ops.models.kimi_k2.chat import ByteTokenizer, Enforcer
from kimi_ops.models.kimi_k2.chat.dialogue import IM_END

TOKENIZER = ByteTokenizer()
END = TOKENIZER.markers[IM_END]


class Scripted:
    """A model that writes what scripts say, so that the engine alone is under test; what it has
    seen stands in the cache, as a model's does."""

    training = False

    def __init__(self, model: KimiK2, episodes: list[Episode]) -> None:
        self.config, self.lm_head = model.config, model.lm_head
        self._scripts = [episode.chat.encode(TOKENIZER)[0] for episode in episodes]

    def eval(self) -> None: ...

    def train(self, mode: bool = True) -> None: ...

    def __call__(self, ids: torch.Tensor, *, cache: LatentCache, logits_to_keep: int):
        width = cache.entries.shape[-1]
        seen = cache.write(0, ids[..., None].float().expand(-1, -1, width))[..., 0]
        cache.length += ids.shape[1]
        return torch.stack([self._next([int(one) for one in row]) for row in seen])[:, None]

    def _next(self, seen: list[int]) -> torch.Tensor:
        logits = torch.zeros(256)
        logits[ord('"')] = 0.5  # beside the script: to the end of what is open
        for ids in self._scripts:
            if ids[: len(seen)] == seen and len(ids) > len(seen):
                logits[ids[len(seen)]] = 1.0
        return logits


def test_what_a_model_would_say_is_said_and_answered(model):
    tasks = held_out_tasks("words", 2)
    episodes = [play(task, random.Random(0)) for task in tasks]
    rolls = roll_out(Scripted(model, episodes), TOKENIZER, tasks, rows=5)
    for roll, episode in zip(rolls, episodes, strict=True):
        ids, own = episode.chat.encode(TOKENIZER)
        assert roll.ids == ids and roll.own == own
        assert roll.episode.messages == episode.messages and roll.episode.finished
    found = score(rolls)
    assert set(found.success.values()) == {1.0} and found.verifiable == 1.0
    assert found.malformed == found.undeclared == found.invalid == 0
    assert found.in_budget == pytest.approx(1.0) and found.triggered == (1.0, 1.0)


def test_errors_are_counted_as_what_they_are(model):
    tasks = [task for task in held_out_tasks("words", 4) if len(task.tools) > 1]
    for noise, name in (("malformed call", "malformed"), ("invented value", "success")):
        some = [task for task in tasks if task.family in ("lookup", "tell")]
        episodes = [play(task, random.Random(0), noise) for task in some]
        found = score(roll_out(Scripted(model, episodes), TOKENIZER, some))
        if name == "malformed":
            assert found.malformed == found.calls > 0
        assert set(found.success.values()) == {0.0}


def misnamed(episode: Episode) -> Episode:
    """The same with calls of a tool that was not declared."""
    episode.parts = [part.replace("functions.", "functions.x") for part in episode.parts]
    return episode


def test_an_enforcer_leaves_no_call_that_nobody_can_carry_out(model):
    tasks = held_out_tasks("words", 4, families=("lookup", "pair"))
    for noise, name in (("malformed call", "malformed"), (None, "undeclared")):
        episodes = [play(task, random.Random(0), noise) for task in tasks]
        if noise is None:
            episodes = [misnamed(episode) for episode in episodes]
        scripted = Scripted(model, episodes)
        free = score(roll_out(scripted, TOKENIZER, tasks))
        assert getattr(free, name) > 0
        forced = score(roll_out(scripted, TOKENIZER, tasks, enforcer=Enforcer))
        assert forced.calls >= 8 and forced.malformed == forced.undeclared == forced.invalid == 0
    right = [play(task, random.Random(0)) for task in tasks]
    rolls = roll_out(Scripted(model, right), TOKENIZER, tasks, enforcer=Enforcer)
    assert [roll.ids for roll in rolls] == [one.chat.encode(TOKENIZER)[0] for one in right]


def test_each_task_has_its_temperature(model):
    tasks = held_out_tasks("trained", 1, families=("lookup",)) * 3
    heat = [0.0, 1.0, 0.0]
    rolls = roll_out(model, TOKENIZER, tasks, temperature=heat, limit=400)
    (alone,) = roll_out(model, TOKENIZER, tasks[:1], limit=400)
    assert rolls[0].ids == rolls[2].ids == alone.ids != rolls[1].ids
    with pytest.raises(ValueError, match="expected one for each of 3 tasks, got 2"):
        roll_out(model, TOKENIZER, tasks, temperature=[1.0, 0.5])


def test_equal_prompts_are_computed_once(model, monkeypatch):
    sizes = []
    forward = KimiK2.forward
    monkeypatch.setattr(
        KimiK2,
        "forward",
        lambda self, ids, **options: (
            sizes.append(tuple(ids.shape)) or forward(self, ids, **options)
        ),
    )
    one, other = held_out_tasks("trained", 2, families=("lookup",))
    roll_out(model, TOKENIZER, [one, other] * 3, limit=300)
    assert sizes[0][0] == 2 and sizes[0][1] > 50 and sizes[1] == (6, 1)


def test_rows_side_by_side_are_rows_alone(model):
    """Greedy, whoever shares the batch, and as `generate` has it."""
    tasks = held_out_tasks("words", 2, families=("lookup", "ask", "none"))
    together = roll_out(model, TOKENIZER, tasks, limit=600)
    for task, roll in zip(tasks, together, strict=True):
        (alone,) = roll_out(model, TOKENIZER, [task], limit=600)
        assert alone.ids == roll.ids and alone.own == roll.own
        first = roll.own.index(True)
        turn = next((i for i in range(first, len(roll.ids)) if not roll.own[i]), len(roll.ids))
        made = model.generate(
            torch.tensor([roll.ids[:first]]), max_new_tokens=turn - first, eos_token_id=END
        )
        assert made[0, first:].tolist() == roll.ids[first:turn]


def test_samples_follow_their_seed(model):
    tasks = held_out_tasks("trained", 3, families=("lookup",))
    one, two, other = (
        [roll.ids for roll in roll_out(model, TOKENIZER, tasks, temperature=1.0, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert one == two != other


def test_budget_and_limit_cut_an_episode(model):
    (task,) = held_out_tasks("words", 1, families=("lookup",))
    short = dataclasses.replace(task, rubric=dataclasses.replace(task.rubric, budget=3))
    (roll,) = roll_out(model, TOKENIZER, [short], temperature=5.0)
    assert sum(roll.own) <= 4 and roll.episode.finished
    prompt = roll.own.index(True)
    (roll,) = roll_out(model, TOKENIZER, [task], temperature=5.0, limit=prompt + 2)
    assert len(roll.ids) <= prompt + 3


def test_ids_fall_into_texts_and_markers():
    ids = [*b"ab", END, *b"c"]
    assert parts_of(ids, TOKENIZER) == ["ab", IM_END, "c"]
    assert parts_of([END], TOKENIZER) == ["", IM_END]
    assert parts_of([], TOKENIZER) == [""]


def test_a_cache_of_chosen_rows(model):
    ids = torch.randint(1, 200, (4, 9))
    cache = LatentCache(model.config, 4, 16)
    model.eval()
    with torch.no_grad():
        model(ids, cache=cache)
        rows = torch.tensor([3, 1])
        more = torch.tensor([[7], [8]])
        chosen = model(more, cache=cache.chosen(rows))
        whole = model(torch.cat((ids[rows], more), 1))[:, -1:]
    torch.testing.assert_close(chosen, whole, rtol=1e-4, atol=1e-4)


def test_tasks_of_a_split_have_its_words_and_are_the_same_for_all():
    for split, fresh in (("trained", False), ("words", True), ("domains", True)):
        tasks = held_out_tasks(split, 3)
        assert [t.user for t in tasks] == [t.user for t in held_out_tasks(split, 3)]
        rows = {row for task in tasks for table in task.world.tables.values() for row in table}
        assert {held_out(row) for row in rows} == {fresh}


def test_a_told_value_is_worth_half_with_praise():
    tasks = held_out_tasks("words", 6, families=("tell",))

    def worth(episode):
        return told_value(Rollout(episode, [], [], deque(), []))

    assert {worth(play(task, random.Random(0))) for task in tasks} == {1.0}
    assert {worth(play(task, random.Random(0), style=True)) for task in tasks} == {0.5}
    assert {worth(play(task, random.Random(0), "invented value")) for task in tasks} == {0.0}
    assert {worth(play(task, random.Random(0), "forgotten step")) for task in tasks} == {0.0}


def test_evaluation_leaves_the_model_in_its_mode(model):
    model.train()
    evaluate(model, TOKENIZER, held_out_tasks("words", 1, families=("none",)))
    assert model.training
