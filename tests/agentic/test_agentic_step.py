# SPDX-License-Identifier: MIT
"""A step of reinforcement, as its settings have it: what is drawn, how, and what is minimised."""

import dataclasses
import random
from collections import Counter

import pytest
import torch

from kimi_ops.agentic import rl
from kimi_ops.agentic.answers import Answers
from kimi_ops.agentic.judge import OVER_BUDGET, reward
from kimi_ops.agentic.learner import Learner, token_losses
from kimi_ops.agentic.progress import Group, Learnt
from kimi_ops.agentic.rl import Rl, RlSettings
from kimi_ops.agentic.sft import batch_of
from kimi_ops.agentic.synthesis import training_tools
from kimi_ops.agentic.tasks import PLAIN, make_task
from kimi_ops.models.kimi_k2.chat import ByteTokenizer
from tests.agentic.agentic_parts import Shortest, as_played, refused, tiny

TOOLS = training_tools(200)
SETTINGS = RlSettings(
    steps=5,
    groups=2,
    told=2,
    tries=4,
    epochs=2,
    minibatches=2,
    warmup=3,
    tau=0.2,
    replay=0.5,
    critic=0.7,
    replayed=24,
    pairs=8,
    temperature=(0.9, 0.5),
    told_temperature=(1.5, 1.1),
    limit=300,
    seed=4,
)
SHOWN = [([*range(40, 46 + n)], [False] * 4 + [True] * (n + 2)) for n in range(8)]  # comparisons


class Teaching(Shortest):
    """With comparisons that can be told from each other."""

    def pairs(self, groups, rewards, rng, limit):
        return SHOWN[:limit]


def replayed(rng):
    return [*rng.randbytes(9)], [True] * 9


def stage(settings: RlSettings = SETTINGS, critic=None) -> Rl:
    learner = Learner(tiny(), 1e-3, bias_rate=0)
    return Rl(learner, ByteTokenizer(), critic or Teaching(), TOOLS, settings, replay=replayed)


@pytest.fixture
def drawn(monkeypatch):
    """What `roll_out` was asked; the teacher plays it."""
    asked = []

    def recorded(model, tokenizer, tasks, **options):
        asked.append((tasks, options, as_played(model, tokenizer, tasks, **options)))
        return asked[-1][2]

    monkeypatch.setattr(rl, "roll_out", recorded)
    return asked


@pytest.fixture
def updates(monkeypatch):
    """The loss of each update, its share of the learning rate and the largest logit; no weight
    changes."""
    made = []

    def step(self, loss, factor):
        value = float(loss().detach())
        most = max(float(layer.max_logits.max()) for layer in self.model.attention_layers())
        self.model.reset_statistics()
        made.append((value, factor, most))
        return value

    monkeypatch.setattr(Learner, "step", step)
    return made


def test_the_settings_are_those_that_the_figures_were_measured_with():
    assert dataclasses.asdict(RlSettings()) == {
        "steps": 16, "groups": 8, "told": 4, "tries": 6, "epochs": 1, "minibatches": 2, "lr": 0.08,
        "warmup": 5, "tau": 0.05, "replay": 0.1, "critic": 0.3, "replayed": 640, "pairs": 16,
        "temperature": (1.0, 0.7), "told_temperature": (1.2, 0.8), "limit": 768, "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, 0, "an int of at least 1") for name in (
            "steps", "groups", "epochs", "minibatches", "warmup", "replayed", "limit")),
        ("tries", 1, "an int of at least 2"),
        ("tries", 2.5, "an int of at least 2"),
        ("told", -1, "an int of at least 0"),
        ("pairs", -1, "an int of at least 0"),
        ("replay", -0.1, "a number of at least 0.0"),
        ("critic", float("nan"), "a number of at least 0.0"),
        ("lr", 0.0, "a number above 0"),
        ("tau", 0.0, "a number above 0"),
        ("tau", float("inf"), "a number above 0"),
        ("temperature", (1.0, 0.0), "numbers above 0"),
        ("told_temperature", (-1.0, 1.0), "numbers above 0"),
    ],
)  # fmt: skip
def test_settings_that_teach_nothing_are_refused(name, value, expected):
    refused(RlSettings, name, value, expected)
    RlSettings(told=0, pairs=0, replay=0.0, critic=0.0, tries=2)


def test_the_rate_rises_and_falls():
    settings = RlSettings(steps=5, warmup=2)
    factors = [settings.factor(step) for step in range(5)]
    assert factors == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])


def test_tries_are_drawn_as_the_settings_say(drawn, monkeypatch):
    monkeypatch.setattr(Rl, "_learn", lambda self, groups, rng: Learnt())
    run = stage()
    run.step()
    run.step()
    for (tasks, options, _), (heat, told) in zip(drawn, [(0.9, 1.5), (0.8, 1.4)], strict=True):
        prompts = tasks[::4]
        assert [task.family == "tell" for task in prompts] == [False, False, True, True]
        assert all(task is prompts[place // 4] for place, task in enumerate(tasks))
        assert options["temperature"] == pytest.approx([heat] * 8 + [told] * 8)
        assert (options["limit"], options["rows"]) == (300, 16)
    stage().step()
    stage(dataclasses.replace(SETTINGS, seed=5)).step()
    first, second, again, other = ([t.user for t in tasks] for tasks, *_ in drawn)
    assert first == again and second != first != other
    seeds = [options["seed"] for _, options, _ in drawn]
    assert seeds[0] == seeds[2] and len(set(seeds)) == 3


def test_prompts_are_of_trained_words_and_a_quarter_asks_for_plain_answers(monkeypatch):
    asked = []

    def recorded(family, tools, rng, *, fresh, declared):
        assert tools is TOOLS
        asked.append((fresh, declared))
        return make_task(family, tools, rng, fresh=fresh, declared=declared)

    monkeypatch.setattr(rl, "make_task", recorded)
    tasks = stage(dataclasses.replace(SETTINGS, groups=300, told=100))._tasks(random.Random(0))
    assert not any(fresh for fresh, _ in asked)
    counts = Counter(declared for _, declared in asked)
    assert [counts[n] / 400 for n in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.07)
    told = [task for task in tasks if task.family == "tell"]
    assert len(told) == 100 and PLAIN not in {task.system for task in told}
    plain = sum(task.system == PLAIN for task in tasks)
    assert plain / 300 == pytest.approx(0.25, abs=0.07)


def test_even_odds_come_most_and_no_family_stays_away(monkeypatch):
    task = make_task("lookup", TOOLS, random.Random(0), fresh=False)
    monkeypatch.setattr(
        rl, "make_task", lambda family, *_, **__: dataclasses.replace(task, family=family)
    )
    run = stage(dataclasses.replace(SETTINGS, groups=4000, told=0))
    run._success = dict.fromkeys(run._success, 1.0) | {"chain": 0.5, "write": 0.1, "pair": 0.0}
    counts = Counter(task.family for task in run._tasks(random.Random(0)))
    total = 1 + 0.36 + 5 * 0.05  # 4 p (1 - p), at least a twentieth
    for family, weight in (("chain", 1.0), ("write", 0.36), ("pair", 0.05), ("lookup", 0.05)):
        assert counts[family] / 4000 == pytest.approx(weight / total, abs=0.015)
    assert len(counts) == 7


def test_a_familys_success_runs_on_with_seven_tenths_of_what_it_was(drawn, monkeypatch):
    monkeypatch.setattr(Rl, "_learn", lambda self, groups, rng: Learnt())
    run, rng = stage(), random.Random(0)
    families = ("lookup", "lookup", "none", "tell")
    tasks = [make_task(family, TOOLS, rng, fresh=False) for family in families]
    monkeypatch.setattr(run, "_tasks", lambda rng: tasks)
    given = iter([1.0, 1.0, 1.0, 0.0] + [0.0] * 4 + [1.0] * 4 + [0.0] * 4)
    monkeypatch.setattr(rl, "reward", lambda episode: next(given))
    found = run.step().families
    assert found["lookup"] == pytest.approx((0.5 * 0.7 + 0.75 * 0.3) * 0.7)
    assert found["none"] == pytest.approx(0.5 * 0.7 + 0.3) and found["chain"] == 0.5
    assert set(found) == set(rl.FAMILIES) - {"tell"}


@torch.no_grad()
def likelihood(model, examples):
    """Mean cross entropy of the ids that examples teach, each forwarded alone."""
    losses = [
        token_losses(model(torch.tensor([ids[:-1]])), torch.tensor([ids]))[0, learnt[1:]]
        for ids, learnt in examples
    ]
    return float(torch.cat(losses).mean())


def test_an_update_is_the_sum_of_its_losses(drawn, updates, monkeypatch):
    """With every log pi - log pi_old a half, so that each term has a value known from outside."""
    parts, batches, of = [], [], Answers.of
    whole: list[Answers] = []
    monkeypatch.setattr(Answers, "of", lambda *given: whole.append(of(*given)) or whole[-1])
    monkeypatch.setattr(
        Answers, "ratios", lambda self, _: parts.append(self) or torch.full((len(self.ids),), 0.5)
    )
    monkeypatch.setattr(rl, "batch_of", lambda some: batches.append(list(some)) or batch_of(some))
    run, critic = stage(), Shortest()
    run.step()
    for made in (parts, batches, updates):
        made.clear()
    step = run.step()

    advantages: dict[tuple[int, ...], list[float]] = {}
    heat = {}
    for start in range(0, 16, 4):
        group = drawn[1][2][start : start + 4]
        rewards = [reward(roll.episode) for roll in group]
        if start >= 8:
            won = critic.rates([roll.episode.written for roll in group])
            rewards = [r if r == OVER_BUDGET else w for r, w in zip(rewards, won, strict=True)]
        for roll, one in zip(group, rewards, strict=True):
            if len(set(rewards)) > 1:
                advantages.setdefault(tuple(roll.ids), []).append(one - sum(rewards) / 4)
                heat[tuple(roll.ids)] = 0.8 if start < 8 else 1.4
    order = []
    for part, (value, factor, _), compared, again in zip(
        parts, updates, batches[::2], batches[1::2], strict=True
    ):
        total = times = 0.0
        for ids, size, own, temperature in zip(
            part.ids.tolist(), part.sizes, part.own, part.temperatures.tolist(), strict=True
        ):
            order.append(tuple(ids[:size]))
            assert temperature == pytest.approx(heat[order[-1]])
            better = advantages[order[-1]]
            mean = sum(better) / len(better)
            total += len(better) * (mean - 0.2 * 0.5) ** 2 / (2 * 0.2 * int(own.sum()))
            times += len(better)
        (beside,) = again
        assert len(beside[0]) == 25
        expected = total / times + 0.7 * likelihood(run.learner.model, compared)
        expected += 0.5 * likelihood(run.learner.model, [beside])
        assert value == pytest.approx(expected, rel=1e-4)
        assert factor == pytest.approx(2 / 3)  # of three steps of warm-up the second
    assert len(parts) == 4 and len({tuple(again[0][0]) for again in batches[1::2]}) == 4
    rows = len(advantages)
    assert 6 <= rows == len(whole[1].ids)
    first, second = order[:rows], order[rows:]
    assert set(first) == set(second) == set(advantages)  # each epoch has all of them once
    assert first != second and abs(len(parts[0].ids) - len(parts[1].ids)) <= 1
    sizes = whole[1].sizes.tolist()
    kept = [tuple(ids[:size]) for ids, size in zip(whole[1].ids.tolist(), sizes, strict=True)]
    assert first not in (kept, kept[::2] + kept[1::2])
    shown = [one for compared in batches[::2] for one in compared]
    assert sorted(shown) == sorted(SHOWN) and [len(one) for one in batches[::2]] == [2] * 4
    assert batches[0] != SHOWN[::4]
    assert step.loss == updates[-1][0] and step.squared == pytest.approx(0.25)
    assert step.largest == updates[-1][2]


def test_each_try_keeps_its_own_advantage():
    rng = random.Random(0)
    tasks = [make_task("lookup", TOOLS, rng, fresh=False) for _ in range(2)]
    tried = [as_played(None, ByteTokenizer(), [task] * 4, seed=1) for task in tasks]
    rewards = [[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.25, 0.0]]
    expected: dict[tuple[int, ...], list[float]] = {}
    for rolls, some in zip(tried, rewards, strict=True):
        for roll, one in zip(rolls, some, strict=True):
            expected.setdefault(tuple(roll.ids), []).append(one - sum(some) / 4)
    groups = [Group(rolls, some) for rolls, some in zip(tried, rewards, strict=True)]
    made = stage()._answers(groups)
    rows = zip(made.ids.tolist(), made.sizes.tolist(), made.advantage.tolist(), strict=True)
    found = {tuple(ids[:size]): better for ids, size, better in rows}
    assert found == {ids: pytest.approx(sum(some) / len(some)) for ids, some in expected.items()}


def test_what_a_step_is_told_of_is_what_it_drew(drawn, updates):
    """Entropy of the policy at the temperatures of the tries; the model is not changed."""
    run = stage(dataclasses.replace(SETTINGS, temperature=(0.5, 0.5), told_temperature=(0.5, 0.5)))
    with torch.no_grad():
        run.learner.model.lm_head.weight.mul_(20)
    cold = run.step().entropy
    run = stage(dataclasses.replace(SETTINGS, temperature=(4.0, 4.0), told_temperature=(4.0, 4.0)))
    with torch.no_grad():
        run.learner.model.lm_head.weight.mul_(20)
    warm = run.step().entropy
    assert cold is not None and warm is not None and cold + 0.5 < warm


def test_more_parts_than_tries_are_no_updates(drawn, updates):
    settings = dataclasses.replace(SETTINGS, groups=1, told=1, epochs=1, minibatches=50, replay=0.0)
    made = stage(settings).step()
    assert 2 <= len(updates) <= 8 and made.squared == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("sign", "agreed"), [(1, 1.0), (-1, 0.0)])
def test_the_agreement_is_that_on_a_verifiable_group(drawn, updates, sign, agreed):
    """And each "tell" has its own rates."""
    asked = []

    class Known(Teaching):
        def rewards_of(self, model, groups):
            asked.extend(groups)
            return [
                [0.25, 0.5, 0.5, 0.25 + place / 8]
                if group[0].episode.task.family == "tell"
                else [sign * reward(roll.episode) for roll in group]
                for place, group in enumerate(groups)
            ]

    run = stage(critic=Known())
    groups, found = run._rewarded(run._sampled(run._tasks(random.Random(1)), random.Random(1)))
    assert found == agreed and run.step().agreement == agreed
    assert [group[0].episode.task.family == "tell" for group in asked[:3]] == [True, True, False]
    compared = asked[2]
    first = next(one for one in groups if one.unequal and not one.told)
    assert compared is first.rolls
    for place, group in enumerate(one for one in groups if one.told):
        for given, roll, rate in zip(
            group.rewards, group.rolls, [0.25, 0.5, 0.5, 0.25 + place / 8], strict=True
        ):
            over = roll.episode.written > roll.episode.task.rubric.budget
            assert given == (OVER_BUDGET if over else rate)


def test_a_group_of_equal_rewards_agrees_with_nobody(monkeypatch):
    rng, critic = random.Random(0), Teaching()
    tasks = [make_task("lookup", TOOLS, rng, fresh=False) for _ in range(3)]
    tried = [as_played(None, ByteTokenizer(), [task] * 2) for task in tasks]
    for given, agreed in ((((1, 1), (1, 0), (0, 1)), 1.0), (((0, 0), (1, 1), (0, 0)), None)):
        episodes = [roll.episode for group in tried for roll in group]
        rewards = dict(zip(map(id, episodes), sum(given, ()), strict=True))
        monkeypatch.setattr(rl, "reward", lambda episode, rewards=rewards: rewards[id(episode)])
        critic.rewards_of = lambda model, groups, rewards=rewards: [
            [rewards[id(roll.episode)] for roll in group] for group in groups
        ]
        groups, found = stage(critic=critic)._rewarded(tried)
        assert found == agreed and [tuple(group.rewards) for group in groups] == list(given)


def test_the_critic_is_asked_for_as_many_comparisons_as_the_settings_say(drawn, updates):
    asked = []

    class Asked(Teaching):
        def pairs(self, groups, rewards, rng, limit):
            asked.append((len(groups), limit))
            return []

    made = stage(critic=Asked()).step()
    assert asked == [(2, 8)] and made.loss is not None
