# SPDX-License-Identifier: MIT
"""Reinforcement: what is learnt from, what is not, and what training can never see."""

import dataclasses
import random

import pytest
import torch

from kimi_ops.agentic import evaluate, rl
from kimi_ops.agentic.answers import Answers
from kimi_ops.agentic.judge import OVER_BUDGET
from kimi_ops.agentic.learner import Learner
from kimi_ops.agentic.progress import Group, agreement
from kimi_ops.agentic.rl import Rl, RlSettings
from kimi_ops.agentic.rollout import roll_out
from kimi_ops.agentic.study import ARMS
from kimi_ops.agentic.synthesis import training_tools
from kimi_ops.agentic.tasks import make_task
from kimi_ops.models.kimi_k2.chat import ByteTokenizer
from tests.agentic.agentic_parts import EXAMPLE, Shortest, as_played, tiny

TOKENIZER = ByteTokenizer()
SMALL = RlSettings(steps=3, warmup=1, groups=3, told=2, tries=3, replayed=16, pairs=4)
TOOLS = training_tools(200)


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(rl, "roll_out", as_played)


def stage(settings: RlSettings = SMALL, *, critic=None, seed: int = 0, lr: float = 1e-3) -> Rl:
    learner = Learner(tiny(seed), lr, bias_rate=0)
    return Rl(learner, TOKENIZER, critic or Shortest(), TOOLS, settings, replay=lambda rng: EXAMPLE)


def bits(run: Rl) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.learner.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_good_tries_become_likelier_than_bad_ones(played):
    """The critic likes few words: an answer with praise is less likely than one without."""
    settings = dataclasses.replace(SMALL, steps=3, groups=1, told=3, replay=0.0, critic=0.0)
    run = stage(settings, lr=5e-3)
    task = make_task("tell", TOOLS, random.Random(5), fresh=False)
    rolls = as_played(None, TOKENIZER, [task] * 6, temperature=1, seed=1)
    made = Answers.of(rolls, torch.ones(6), torch.zeros(6), torch.device("cpu"))
    before, _ = made.remembered(run.learner.model)
    while not run.finished:
        run.step()
    gained = before.ratios(run.learner.model).detach()
    written = made.lengths
    assert gained[written == written.max()].max() + 1 < gained[written == written.min()].min()


def test_a_step_changes_weights_but_no_route(played):
    run = stage()
    before, model = bits(run), run.learner.model
    biases = [moe.gate.e_score_correction_bias.clone() for moe in model.moe_layers()]
    made = run.step()
    assert not same(before, bits(run))
    for moe, bias in zip(model.moe_layers(), biases, strict=True):
        assert torch.equal(moe.gate.e_score_correction_bias, bias)
    assert made.step == 1 and 0 < made.success < 1 and made.reward == pytest.approx(made.success)
    assert made.told == pytest.approx(0.5) and 0 < made.budget <= 1 and made.malformed == 0
    assert made.entropy is not None and 5 < made.entropy < 5.6  # of 256 bytes, not trained
    assert made.squared is not None and made.squared > 0
    assert made.loss is not None and made.largest is not None and made.largest > -10
    with pytest.raises(ValueError, match="expected a bias_rate of 0, got 0.1"):
        learner = Learner(tiny(), 1e-3, bias_rate=0.1)
        Rl(learner, TOKENIZER, Shortest(), TOOLS, SMALL, replay=lambda rng: EXAMPLE)


def test_a_step_without_an_unequal_group_learns_nothing(played, monkeypatch):
    monkeypatch.setattr(rl, "reward", lambda episode: 0.0)
    critic = Shortest()
    critic.rewards_of = lambda model, groups: [[0.5] * len(group) for group in groups]
    run = stage(critic=critic)
    before = bits(run)
    made = run.step()
    assert same(before, bits(run)) and made.loss is made.entropy is made.squared is None
    assert made.dropped == 1 and not critic.taught


def test_groups_of_equal_reward_are_left_out(played, monkeypatch):
    """Only the first group is unequal: only its tries are answers to learn from."""
    sizes = []
    monkeypatch.setattr(
        Answers,
        "remembered",
        lambda self, model, real=Answers.remembered: (
            sizes.append(len(self.ids)) or real(self, model)
        ),
    )
    told = iter([1.0, 0.0, 0.0] + [0.0] * 100)
    monkeypatch.setattr(rl, "reward", lambda episode: next(told))
    critic = Shortest()
    critic.rewards_of = lambda model, groups: [[0.5] * len(group) for group in groups]
    made = stage(critic=critic).step()
    assert sizes == [3] and made.dropped == pytest.approx(0.8)


def test_the_critic_alone_rewards_tell_and_learns_of_the_others_alone(played):
    critic = Shortest()
    stage(critic=critic).step()
    assert critic.judged.count("tell") == 2 and len(critic.judged) == 3  # and one that it agrees to
    families = [family for family, _ in critic.taught]
    assert len(families) == 3 and "tell" not in families
    assert {reward for _, some in critic.taught for reward in some} <= {0.0, 1.0, OVER_BUDGET}


def test_too_much_said_is_punished_whatever_the_critic_thinks():
    def rewarded(rolls):
        (group,), _ = stage()._rewarded([rolls])
        return group.rewards

    task = make_task("tell", TOOLS, random.Random(0), fresh=False)
    short = dataclasses.replace(task, rubric=dataclasses.replace(task.rubric, budget=5))
    rolls = as_played(None, TOKENIZER, [task, short], temperature=1, seed=0)
    assert rewarded(rolls)[1] == OVER_BUDGET
    rolls = as_played(None, TOKENIZER, [task, task, task], temperature=1, seed=0)
    assert sum(rewarded(rolls)) == pytest.approx(1.5)


def test_a_stage_that_is_taken_up_again_goes_on_to_the_same_bits(played):
    settings = dataclasses.replace(SMALL, steps=2, epochs=1, groups=1, told=1)
    whole, first = stage(settings), stage(settings)
    made = [whole.step() for _ in range(2)]
    assert whole.finished and first.step() == made[0]
    second = stage(settings, seed=7)
    second.load_state_dict(first.state_dict())
    assert [second.step()] == made[1:]
    assert same(bits(whole), bits(second)) and second.history == made


def test_what_tell_is_worth_never_reaches_training(monkeypatch):
    """With the true sampler: the worth, poisoned, changes no bit."""
    settings = dataclasses.replace(SMALL, steps=1, epochs=1, groups=1, told=2, limit=500)
    clean = stage(settings)
    made = clean.step()
    assert made.loss is not None

    def poison(*_):
        raise AssertionError("the hidden worth was asked for")

    monkeypatch.setattr(evaluate, "told_value", poison)
    monkeypatch.setattr("kimi_ops.agentic.study.told_value", poison)
    poisoned = stage(settings)
    assert poisoned.step() == made and same(bits(clean), bits(poisoned))
    with pytest.raises(AssertionError, match="hidden worth"):
        stage(settings, critic=ARMS["oracle"](Shortest(), tiny())).step()


def test_arms_judge_as_they_say():
    model, critic = tiny(), Shortest()
    tasks = [make_task(name, TOOLS, random.Random(3), fresh=False) for name in ("tell", "none")]
    groups = [as_played(None, TOKENIZER, [task] * 6, temperature=1, seed=0) for task in tasks]
    rates = critic.rewards_of(model, groups)
    assert ARMS["refined"](critic, model) is critic
    seen = []
    critic.rewards_of = lambda model, groups: seen.append(model) or rates
    frozen = ARMS["frozen"](critic, model)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert frozen.rewards_of(model, groups) == rates and frozen.pairs([], [], None, 9) == []
    assert all(torch.equal(before[name], one) for name, one in seen[0].state_dict().items())
    shuffled = ARMS["shuffled"](critic, model)
    mixed = shuffled.rewards_of(model, groups)
    assert [sorted(some) for some in mixed] == [sorted(some) for some in rates] and mixed != rates
    assert mixed == shuffled.rewards_of(model, groups)
    oracle = ARMS["oracle"](critic, model)
    worth = [evaluate.told_value(roll) for roll in groups[0]]
    assert oracle.rewards_of(model, groups) == [worth, rates[1]]
    assert shuffled.pairs([], [], None, 2) == oracle.pairs([], [], None, 2) == [EXAMPLE] * 2


def test_temperatures_fall_and_families_of_even_odds_come_most():
    settings = RlSettings(steps=11)
    assert [settings.temperature_of("lookup", step) for step in (0, 5, 10)] == pytest.approx(
        [1.0, 0.85, 0.7]
    )
    assert [settings.temperature_of("tell", step) for step in (0, 10)] == [1.2, 0.8]
    run = stage(RlSettings(groups=60, told=1))
    run._success = dict.fromkeys(run._success, 1.0) | {"chain": 0.5, "pair": 0.0}
    families = [task.family for task in run._tasks(random.Random(0))]
    assert families.count("chain") > 30 > 10 > families.count("pair")
    assert families[-1] == "tell" and len(families) == 61
    plain = [task.system for task in run._tasks(random.Random(1))].count(rl.PLAIN)
    assert 5 <= plain <= 28


def test_rows_with_padding_are_rows_alone():
    model = tiny().train()
    rng = random.Random(0)
    tasks = [make_task(family, TOOLS, rng, fresh=False) for family in ("none", "chain", "lookup")]
    rolls = as_played(None, TOKENIZER, tasks, temperature=1, seed=0)
    heat = torch.tensor([1.0, 0.5, 2.0])
    made, entropy = Answers.of(rolls, heat, torch.zeros(3), torch.device("cpu")).remembered(model)
    assert made.lengths.tolist() == [sum(roll.own) for roll in rolls] and entropy > 1
    for row, roll in enumerate(rolls):
        one, _ = Answers.of([roll], heat[row : row + 1], torch.zeros(1),
                            torch.device("cpu")).remembered(model)  # fmt: skip
        size = one.old.shape[1]
        torch.testing.assert_close(
            made.old[row, :size][one.own[0]], one.old[0][one.own[0]], rtol=1e-4, atol=1e-4
        )
        assert not made.own[row, size:].any() and made.sizes[row] == len(roll.ids)
    assert all(moe.tokens_per_expert.sum() == 0 for moe in model.moe_layers())  # as if not asked
    torch.testing.assert_close(made.ratios(model), torch.zeros(3), rtol=0, atol=1e-3)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    moved = [float(made.part(torch.tensor([row])).ratios(model).detach()) for row in range(3)]
    assert len({round(one, 3) for one in moved}) == 3
    torch.testing.assert_close(made.ratios(model).tolist(), moved, rtol=1e-3, atol=1e-3)
    assert sorted(int(row) for rows in made.pieces() for row in rows) == [0, 1, 2]


def test_equal_tries_are_computed_once():
    tasks = [make_task("lookup", TOOLS, random.Random(seed), fresh=False) for seed in (0, 1, 0, 0)]
    rolls = as_played(None, TOKENIZER, tasks, temperature=1, seed=0)
    rolls = [rolls[0], rolls[0], rolls[1], rolls[0]]
    heat, better = torch.tensor([1.0, 1.0, 2.0, 1.0]), torch.tensor([3.0, 3.0, 7.0, 3.0])
    made = Answers.of(rolls, heat, better, torch.device("cpu"))
    assert made.times.tolist() == [3, 1] and made.advantage.tolist() == [3, 7]
    assert made.temperatures.tolist() == [1, 2] and made.ids.shape[0] == 2
    assert made.mean(made.advantage) == better.mean()


def test_equal_tries_have_the_mean_of_their_advantages():
    """Of (A - tau s)^2 the mean over equal tries has the gradient of the mean A; a judge that mixes
    verdicts up gives equal tries unequal ones."""
    task = make_task("lookup", TOOLS, random.Random(0), fresh=False)
    (roll,) = as_played(None, TOKENIZER, [task], temperature=1, seed=0)
    made = Answers.of([roll] * 2, torch.ones(2), torch.tensor([1.0, -0.5]), torch.device("cpu"))
    assert made.times.tolist() == [2] and made.advantage.tolist() == [0.25]
    heat = torch.tensor([1.0, 0.5])  # as likely under the old policy at another temperature: no
    made = Answers.of([roll] * 2, heat, torch.tensor([1.0, -0.5]), torch.device("cpu"))
    assert made.times.tolist() == [1, 1] and made.temperatures.tolist() == [1.0, 0.5]
    assert made.advantage.tolist() == [1.0, -0.5]


def test_rows_are_forwarded_in_pieces(monkeypatch):
    tasks = [make_task("lookup", TOOLS, random.Random(seed), fresh=False) for seed in range(4)]
    rolls = as_played(None, TOKENIZER, tasks, temperature=1, seed=0)
    whole = Answers.of(rolls, torch.ones(4), torch.zeros(4), torch.device("cpu"))
    (all_rows,) = whole.pieces()
    assert len(all_rows) == 4
    monkeypatch.setattr("kimi_ops.agentic.answers.PIECE", 500)
    assert len(list(whole.pieces())) == 4
    sizes = sorted(len(roll.ids) for roll in rolls)
    for most in range(sizes[0], 5 * sizes[-1], 7):
        monkeypatch.setattr("kimi_ops.agentic.answers.PIECE", most)
        pieces = list(whole.pieces())
        assert sorted(int(row) for rows in pieces for row in rows) == [0, 1, 2, 3]
        for rows in pieces:
            wide = int(whole.sizes[rows].max())
            assert len(rows) == 1 or len(rows) * wide <= most
        first = pieces[0]
        assert len(first) == min(4, max(1, most // int(whole.sizes[first].max())))
    shortest = int(whole.sizes.argmin())
    assert sizes[0] < sizes[-1] and whole.part(torch.tensor([shortest])).ids.shape[1] == sizes[0]
    part = whole.part(torch.tensor([2, 0]))
    assert part.ids.shape[1] == max(len(rolls[2].ids), len(rolls[0].ids))
    assert part.ids[1, : len(rolls[0].ids)].tolist() == rolls[0].ids


def test_agreement_counts_pairs():
    assert agreement([3, 2, 1], [1, 0, OVER_BUDGET]) == 1
    assert agreement([1, 1, 0], [1, 0, 1]) == 0.25
    group = Group([], [1.0, 0.0, 1.0, 1.0])
    assert group.unequal and group.success == 0.75 and not Group([], [0.5, 0.5]).unequal


def test_sampled_tries_at_a_prompt_differ():
    (task,) = [make_task("lookup", TOOLS, random.Random(1), fresh=False)]
    rolls = roll_out(tiny(), TOKENIZER, [task] * 3, temperature=[1.0, 1.0, 0.0], limit=400)
    assert len({tuple(roll.ids) for roll in rolls}) == 3
    (alone,) = roll_out(tiny(), TOKENIZER, [task], limit=400)
    assert rolls[2].ids == alone.ids
