# SPDX-License-Identifier: MIT
"""The critic: the model itself, asked which of two answers is the better under a rubric.

    system     Judge: no praise; no boast.
    user       QUESTION
               A: the level is 7
               B: lovely to ask! the level is 7
    assistant  p:A j:= >A

It says of each line of the rubric which answer is the better, or `=`, and then of the whole: the
reasons' letters are the likeliest ones, the win is the probability of the last letter. All that is
between is given, so nothing has to be parsed.

What it learns from are answers to verifiable tasks, of which code can tell the better. What a
"tell" is worth is not known here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from kimi_ops.agentic.comparison import Answer, Comparison, one_line, reasons, unequal, verdict
from kimi_ops.agentic.judge import fulfilled, well_formed
from kimi_ops.agentic.rollout import Rollout
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import Tokenizer, render
from kimi_ops.models.kimi_k2.chat.dialogue import IM_END

__all__ = ["RUBRIC", "Critic", "win_rates"]

RUBRIC = {"g": "grounded", "p": "no praise", "j": "no boast"}
MIRRORED = {"A": "B", "B": "A", "=": "="}

Example = tuple[list[int], list[bool]]  # ids, and which of them are learnt


def win_rates(wins: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each row but for its diagonal: how often one answer beats the others.

    Examples
    --------
    >>> from kimi_ops.agentic.critic import win_rates
    >>> win_rates([[0.5, 1.0, 0.75], [0.0, 0.5, 0.5], [0.25, 0.5, 0.5]])
    [0.875, 0.25, 0.375]
    """
    if len(wins) == 1:
        return [0.5]
    return [(sum(row) - row[i]) / (len(wins) - 1) for i, row in enumerate(wins)]


class Critic:
    """
    Parameters
    ----------
    tokenizer : Tokenizer
        In which A, B and `=` are one id each.
    lines : str
        Of `RUBRIC`, in the order of the reasons. With "g" the calls and their results are shown
        before each answer.
    rows : int
        Comparisons side by side.
    """

    def __init__(self, tokenizer: Tokenizer, *, lines: str = "pj", rows: int = 64) -> None:
        self.tokenizer, self.lines, self.rows = tokenizer, lines, rows
        self._letters = {letter: tokenizer.encode(letter)[0] for letter in "AB="}
        self._reply: list[int | None] = []  # None: a letter, which is the model's
        for part in (*(f"{line}:" for line in lines), ">"):
            self._reply += [*tokenizer.encode(f" {part}" if self._reply else part), None]

    def prompt(self, one: Comparison) -> list[int]:
        """Ids up to where the critic's reply begins."""
        shown = f"{one.question}\nA: {self._shown(one.first)}\nB: {self._shown(one.second)}"
        rubric = "; ".join(RUBRIC[line] for line in self.lines)
        messages = [
            {"role": "system", "content": f"Judge: {rubric}."},
            {"role": "user", "content": shown},
        ]
        return render(messages, generation_prompt=True).encode(self.tokenizer)[0]

    def _shown(self, one: Answer) -> str:
        return f"{one.evidence} | {one.said}" if "g" in self.lines else one.said

    def example(self, one: Comparison, letters: Sequence[str]) -> Example:
        """A comparison with its reply, of which the letters are learnt."""
        ids, chosen = self.prompt(one), iter(letters)
        learnt = [False] * len(ids)
        for given in self._reply:
            ids.append(self._letters[next(chosen)] if given is None else given)
            learnt.append(given is None)
        return [*ids, self.tokenizer.markers[IM_END]], [*learnt, False]

    def synthesised(self, lines: Iterable[Mapping[str, Any]]) -> list[Example]:
        """Of the pairs that synthesis made, each in both orders; what code says of the rubric's
        lines is learnt, equal answers too.

        Parameters
        ----------
        lines : iterable of dict
            Of `read_attempts`.
        """
        found: list[Example] = []
        for line in lines:
            if (pair := line["pair"]) is not None:
                users = (one["content"] for one in pair["better"] if one["role"] == "user")
                shown = Comparison.of(users, pair["better"], pair["worse"])
                found += self._both(shown, self._code(shown, (True, pair["right"])))
        return found

    def pairs(
        self,
        groups: Sequence[Sequence[Rollout]],
        rewards: Sequence[Sequence[float]],
        rng: random.Random,
        limit: int,
    ) -> list[Example]:
        """Of attempts of unequal reward at one verifiable task where the rubric's lines say which
        is the better, each in both orders.

        Parameters
        ----------
        groups : sequence of sequences of Rollout
            Attempts at one task each. Those at "tell" are passed over: no reward tells what they
            are worth.
        rewards : sequence of sequences of float
            By the judge.
        rng : random.Random
        limit : int
            Examples at most.
        """
        found: dict[tuple[Comparison, tuple[str, ...]], None] = {}
        for group, given in zip(groups, rewards, strict=True):
            if group[0].episode.task.family == "tell":
                continue
            for shown, one, other in unequal(group, given):
                letters = self._code(shown, (fulfilled(one.episode), fulfilled(other.episode)))
                if letters[-1] == "A":  # the rubric says what the reward does
                    found[shown, letters] = None
        some = rng.sample(sorted(found, key=str), min(len(found), limit // 2))
        return [example for shown, letters in some for example in self._both(shown, letters)]

    def _code(self, one: Comparison, right: tuple[bool, bool]) -> tuple[str, ...]:
        """What code replies."""
        letters = reasons(one.first, one.second, right)
        mine = {line: letters[line] for line in self.lines}
        return (*mine.values(), verdict(mine))

    def _both(self, one: Comparison, letters: Sequence[str]) -> list[Example]:
        """Both orders of a comparison and its reply."""
        mirrored = [MIRRORED[letter] for letter in letters]
        return [self.example(one, letters), self.example(one.swapped, mirrored)]

    def rewards(self, model: KimiK2, group: Sequence[Rollout]) -> list[float]:
        """How often each of a group's answers beats the others, as `rewards_of` has it."""
        return self.rewards_of(model, [group])[0]

    def rewards_of(self, model: KimiK2, groups: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        """How often each answer of a group beats the others: 1/2 in the mean of a group.

        ``win(i, j) = (P(A | i, j) + P(B | j, i)) / 2``, where half of `=` counts for either, and
        ``r_i = mean over j != i of win(i, j)``:
        every two are shown in both orders, so that a favourite place cancels out. An answer that
        code cannot read loses without a comparison; two of them are equal, and so are two that say
        the same.

        Parameters
        ----------
        model : KimiK2
        groups : sequence of sequences of Rollout
            Attempts at one task each.
        """
        told = [
            [Answer.of(one.episode.messages) if well_formed(one.episode) else None for one in group]
            for group in groups
        ]
        questions = [one_line(" / ".join(group[0].episode.task.user)) for group in groups]
        asked = list(
            {
                Comparison(question, *two): None
                for question, answers in zip(questions, told, strict=True)
                for two in combinations(sorted({one for one in answers if one}, key=str), 2)
            }
        )
        won = dict(zip(asked, self.wins(model, asked), strict=True))
        won |= {one.swapped: 1.0 - share for one, share in won.items()}

        def win(question: str, one: Answer | None, other: Answer | None) -> float:
            if one is None or other is None or one == other:
                return 0.5 + 0.5 * ((one is not None) - (other is not None))
            return won[Comparison(question, one, other)]

        return [
            win_rates([[win(question, one, other) for other in answers] for one in answers])
            for question, answers in zip(questions, told, strict=True)
        ]

    def wins(self, model: KimiK2, comparisons: Sequence[Comparison]) -> list[float]:
        """Of each the probability that its first answer is the better, over both orders."""
        swapped = [one.swapped for one in comparisons]
        shares = self.first_shares(model, [*comparisons, *swapped])
        two = zip(shares[: len(swapped)], shares[len(swapped) :], strict=True)
        return [(first + 1.0 - second) / 2 for first, second in two]

    @torch.no_grad()
    def first_shares(self, model: KimiK2, comparisons: Sequence[Comparison]) -> list[float]:
        """Of each the probability that A is the better, and half of that of `=`, in this order
        alone."""
        prompts = [self.prompt(one) for one in comparisons]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        shares = [0.0] * len(prompts)
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(order), self.rows):
                some = order[start : start + self.rows]
                read = self._read(model, [prompts[i] for i in some])
                for i, share in zip(some, read, strict=True):
                    shares[i] = share
        finally:
            model.train(was_training)
        return shares

    def _read(self, model: KimiK2, prompts: Sequence[list[int]]) -> list[float]:
        """Let the model fill in the letters; the share of A in the last."""
        width, device = max(map(len, prompts)), model.lm_head.weight.device
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = True
        shares: list[float] = []

        def given(so_far: Tensor, logits: Tensor) -> Tensor:
            place = so_far.shape[1] - width
            if place == len(self._reply) - 1:
                three = logits[:, list(self._letters.values())].double().softmax(-1)
                shares.extend((three[:, 0] + three[:, 2] / 2).tolist())
            wanted = self._reply[place]
            allowed = list(self._letters.values()) if wanted is None else [wanted]
            barred = torch.full_like(logits, -torch.inf)
            barred[:, allowed] = logits[:, allowed]
            return barred

        model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=len(self._reply),
            logits_processor=[given],
        )
        return shares
