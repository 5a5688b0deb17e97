# SPDX-License-Identifier: MIT
"""Reinforcement: several tries at each of some prompts, rewarded by the end state, or by the critic
where no end says how good a try was; then a few updates by the squared objective.

What "tell" is worth is nowhere in here: the critic is its only reward.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kimi_ops.agentic.answers import Answers
from kimi_ops.agentic.judge import OVER_BUDGET, reward
from kimi_ops.agentic.learner import Learner, token_losses
from kimi_ops.agentic.objective import advantages, squared_losses
from kimi_ops.agentic.progress import TELL, Group, Learnt, RlStep, agreement
from kimi_ops.agentic.rollout import Rollout, roll_out
from kimi_ops.agentic.settings import at_least, positive
from kimi_ops.agentic.sft import Example, Source, batch_of, packed
from kimi_ops.agentic.specs import Tool
from kimi_ops.agentic.synthesis import PLAIN_SHARE
from kimi_ops.agentic.tasks import FAMILIES, PLAIN, Task, make_task
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import Tokenizer

__all__ = ["Judges", "Rl", "RlSettings"]

VERIFIABLE = tuple(family for family in FAMILIES if family != TELL)
MEMORY = 0.7  # of a family's success, for which groups it is drawn
SELDOM = 0.05  # weight of a family that never fails, or always, where 1 is even odds


class Judges(Protocol):
    """What reinforcement asks of a critic."""

    def rewards_of(self, model: KimiK2, groups: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        """How often each try at a prompt wins against the others: 1/2 in the mean of a group."""

    def pairs(
        self,
        groups: Sequence[Sequence[Rollout]],
        rewards: Sequence[Sequence[float]],
        rng: random.Random,
        limit: int,
    ) -> list[Example]:
        """Comparisons to learn from, of tries whose rewards are known and unequal."""


@dataclass(frozen=True)
class RlSettings:
    """
    Attributes
    ----------
    steps : int
        Of sampling.
    groups, told : int
        Prompts of a step: with a verifiable end, and of "tell".
    tries : int
        At a prompt.
    epochs, minibatches : int
        Updates of a step: so often through its tries, each time in so many parts.
    lr : float
        Share of the supervised stage's peak learning rate.
    warmup : int
        Steps until then: MuonClip moves as far by the noise of one update as by the mean of many.
        From there it falls, to be 0 behind the last step.
    tau : float
        How dear it is to leave the policy that made the tries.
    replay, critic : float
        Weights of the losses on trajectories and text, and on comparisons.
    replayed : int
        Bytes of trajectories and text of an update.
    pairs : int
        Comparisons of a step, at most.
    temperature, told_temperature : tuple of float
        Of the first and of the last step.
    limit : int
        Ids of an episode.
    seed : int

    Raises
    ------
    ValueError
        A setting with which nothing could be learnt: fewer than two tries, no temperature.
    """

    steps: int = 16
    groups: int = 8
    told: int = 4
    tries: int = 6
    epochs: int = 1
    minibatches: int = 2
    lr: float = 0.08
    warmup: int = 5
    tau: float = 0.05
    replay: float = 0.1
    critic: float = 0.3
    replayed: int = 640
    pairs: int = 16
    temperature: tuple[float, float] = (1.0, 0.7)
    told_temperature: tuple[float, float] = (1.2, 0.8)
    limit: int = 768
    seed: int = 0

    def __post_init__(self) -> None:
        ones = ("steps", "groups", "epochs", "minibatches", "warmup", "replayed", "limit")
        at_least(self, dict.fromkeys(ones, 1) | {"tries": 2, "told": 0, "pairs": 0})
        at_least(self, {"replay": 0.0, "critic": 0.0})
        positive(self, "lr", "tau", "temperature", "told_temperature")

    def factor(self, step: int) -> float:
        """Share of `lr` at a step, from 0."""
        return min((step + 1) / self.warmup, 1 - step / self.steps)

    def temperature_of(self, family: str, step: int) -> float:
        """At a step, from 0."""
        first, last = self.told_temperature if family == TELL else self.temperature
        return first + step / max(1, self.steps - 1) * (last - first)


class Rl:
    """The stage, step by step.

    Parameters
    ----------
    learner : Learner
        Whose `bias_rate` is 0: another route is another policy, which no gradient knows.
    tokenizer : Tokenizer
    critic : Judges
    tools : sequence of Tool
        That tasks are made of.
    settings : RlSettings
    replay : callable
        Gives kept trajectories and other text.

    Raises
    ------
    ValueError
        A learner that changes routes.
    """

    def __init__(
        self,
        learner: Learner,
        tokenizer: Tokenizer,
        critic: Judges,
        tools: Sequence[Tool],
        settings: RlSettings,
        *,
        replay: Source,
    ) -> None:
        if learner.bias_rate:
            raise ValueError(
                f"Rl: learner: expected a bias_rate of 0, got {learner.bias_rate}; make the "
                "Learner with bias_rate=0"
            )
        self.learner, self.settings = learner, settings
        self.history: list[RlStep] = []
        self._tokenizer, self._critic, self._tools = tokenizer, critic, tools
        self._replay = replay
        self._success = dict.fromkeys(VERIFIABLE, 0.5)

    @property
    def made(self) -> int:
        """Steps."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        return self.made >= self.settings.steps

    def step(self) -> RlStep:
        """Sample, reward, learn."""
        rng = random.Random(f"rl {self.settings.seed} {self.made}")
        groups, agreed = self._rewarded(self._sampled(self._tasks(rng), rng))
        learnt = Learnt()
        if any(group.unequal for group in groups):
            learnt = self._learn(groups, rng)
        for group in groups:
            if not group.told:
                family = group.task.family
                self._success[family] *= MEMORY
                self._success[family] += (1 - MEMORY) * group.success
        made = RlStep.of(self.made + 1, groups, self._success, agreed, learnt)
        self.history.append(made)
        return made

    def _tasks(self, rng: random.Random) -> list[Task]:
        """Prompts; what always goes well, or never yet, comes seldom: a group of equal rewards
        teaches nothing."""
        odds = [self._success[family] for family in VERIFIABLE]
        weights = [max(SELDOM, 4 * share * (1 - share)) for share in odds]
        families = rng.choices(VERIFIABLE, weights, k=self.settings.groups)
        tasks = []
        for family in [*families, *[TELL] * self.settings.told]:
            declared = rng.choice((1, 2, 2, 3))
            task = make_task(family, self._tools, rng, fresh=False, declared=declared)
            if family != TELL and rng.random() < PLAIN_SHARE:
                task = dataclasses.replace(task, system=PLAIN)
            tasks.append(task)
        return tasks

    def _sampled(self, tasks: Sequence[Task], rng: random.Random) -> list[list[Rollout]]:
        """Tries at each of the prompts."""
        tries = self.settings.tries
        rolls = roll_out(
            self.learner.model,
            self._tokenizer,
            [task for task in tasks for _ in range(tries)],
            temperature=[self._temperature(task) for task in tasks for _ in range(tries)],
            seed=rng.getrandbits(31),
            rows=len(tasks) * tries,
            limit=self.settings.limit,
        )
        return [rolls[start : start + tries] for start in range(0, len(rolls), tries)]

    def _temperature(self, task: Task) -> float:
        return self.settings.temperature_of(task.family, self.made)

    def _rewarded(self, tried: Sequence[list[Rollout]]) -> tuple[list[Group], float | None]:
        """The tries with their rewards; and how the critic, before it learns from them, orders
        those of a verifiable group."""
        groups = [Group(rolls, [reward(roll.episode) for roll in rolls]) for rolls in tried]
        told = [group for group in groups if group.told]
        compared = next((group for group in groups if group.unequal and not group.told), None)
        asked = [*told, compared] if compared else told
        rates = self._critic.rewards_of(self.learner.model, [group.rolls for group in asked])
        for group, found in zip(told, rates, strict=False):
            group.rewards = [
                OVER_BUDGET if ended == OVER_BUDGET else rate
                for ended, rate in zip(group.rewards, found, strict=True)
            ]
        return groups, agreement(rates[-1], compared.rewards) if compared else None

    def _learn(self, groups: Sequence[Group], rng: random.Random) -> Learnt:
        """The updates of a step."""
        settings, model = self.settings, self.learner.model
        answers, entropy = self._answers(groups).remembered(model)
        pairs = self._pairs(groups, rng)
        updates, learnt = settings.epochs * settings.minibatches, Learnt(entropy)
        factor = settings.factor(self.made)
        for update in range(updates):
            place = update % settings.minibatches
            if place == 0:
                order = rng.sample(range(len(answers.ids)), len(answers.ids))
            some = order[place :: settings.minibatches]
            replayed = packed(self._replay, rng, settings.replayed)
            if some:
                part, compared = answers.part(torch.tensor(some)), pairs[update::updates]
                loss = partial(self._loss, part, compared, replayed, learnt)
                learnt.loss = self.learner.step(loss, factor)
        return learnt

    def _answers(self, groups: Sequence[Group]) -> Answers:
        """The tries of groups that say what is better."""
        kept = [group for group in groups if group.unequal]
        better = advantages(torch.tensor([group.rewards for group in kept], dtype=torch.float32))
        drawn = torch.tensor([self._temperature(group.task) for group in kept], dtype=torch.float32)
        return Answers.of(
            [roll for group in kept for roll in group.rolls],
            drawn.repeat_interleave(self.settings.tries),
            better.flatten(),
            self.learner.model.lm_head.weight.device,
        )

    def _pairs(self, groups: Sequence[Group], rng: random.Random) -> list[Example]:
        """Comparisons of tries whose reward the end state gives, in any order."""
        known = [group for group in groups if not group.told]
        pairs = self._critic.pairs(
            [group.rolls for group in known],
            [group.rewards for group in known],
            rng,
            self.settings.pairs,
        )
        return rng.sample(pairs, len(pairs))

    def _loss(
        self,
        answers: Answers,
        compared: Sequence[Example],
        replayed: Example,
        learnt: Learnt,
    ) -> Tensor:
        settings, model = self.settings, self.learner.model
        ratios = answers.ratios(model)
        learnt.squared.append(float(answers.mean(ratios.detach().square())))
        found = answers.mean(
            squared_losses(ratios, answers.advantage, answers.lengths, settings.tau)
        )
        if compared:
            found = found + settings.critic * self._likelihood(compared)
        found = found + settings.replay * self._likelihood([replayed])
        learnt.largest = max(float(layer.max_logits.max()) for layer in model.attention_layers())
        return found

    def _likelihood(self, examples: Sequence[Example]) -> Tensor:
        """Cross entropy of what examples teach."""
        device = self.learner.model.lm_head.weight.device
        ids, learnt, _ = batch_of(examples)
        losses = token_losses(self.learner.model(ids[:, :-1].to(device)), ids.to(device))
        return losses[learnt.to(device)].sum() / learnt.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on, but for the data."""
        return {
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "history": [dataclasses.asdict(made) for made in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.model.load_state_dict(state["model"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.history = [RlStep(**made) for made in state["history"]]
        if self.history:
            self._success = dict(self.history[-1].families)
