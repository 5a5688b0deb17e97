# SPDX-License-Identifier: MIT
"""What every stage of a run came to: a file of numbers, a table of them, one conversation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kimi_ops.agentic.critic import Critic
from kimi_ops.agentic.evaluate import (
    SPLITS,
    agreement,
    held_out_tasks,
    score,
    scripted,
    text_loss,
)
from kimi_ops.agentic.progress import TELL
from kimi_ops.agentic.rollout import Rollout, roll_out
from kimi_ops.agentic.stages import Place
from kimi_ops.agentic.tasks import FAMILIES, PLAIN, SYSTEM
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import ByteTokenizer, Enforcer
from kimi_ops.train.checkpoint import replace_file

__all__ = ["Results", "table"]

CRITICS = ("verifiable", TELL, "scripted tell")  # pairs of what
SCRIPTED = 24  # tasks
WAYS = ("greedy", "enforced", "sampled", "plain")


class Results:
    """
    Parameters
    ----------
    out : Path
        Of the run; what ``results.json`` holds is not measured again.
    """

    def __init__(self, out: Path) -> None:
        self._file = out / "results.json"
        self.found: dict[str, Any] = {}
        if self._file.exists():
            self.found = json.loads(self._file.read_text())

    def add(
        self, place: Place, stage: str, seconds: float, model: KimiK2, episodes: int, tries: int
    ) -> None:
        """Evaluate the model that a stage made, unless that was done; keep it as a checkpoint.

        Greedy, one try at a task; the same with every call held to its declaration; drawn at
        temperature 1, several; and so where the system asks for plain answers, as it does in a
        quarter of what is reinforced. The critic's accuracy is that on pairs that were drawn, with
        held-out words, and on the teacher's.
        """
        if set(WAYS) <= set(self.found.get(stage, ())):
            return
        tokenizer, words = ByteTokenizer(), dict[str, list[Rollout]]()
        measured: dict[str, Any] = {"seconds": round(seconds, 1), **{way: {} for way in WAYS}}
        with tqdm(
            total=len(SPLITS) * len(WAYS), desc=f"after {stage}", disable=not place.bar, leave=False
        ) as shown:
            for way, split in [(way, split) for way in WAYS for split in SPLITS]:
                count, temperature = (tries, 1.0) if way in ("sampled", "plain") else (1, 0.0)
                tasks = held_out_tasks(split, episodes, system=PLAIN if way == "plain" else SYSTEM)
                tasks = [task for task in tasks for _ in range(count)]
                enforcer = Enforcer if way == "enforced" else None
                rolls = roll_out(
                    model, tokenizer, tasks, temperature=temperature, enforcer=enforcer
                )
                measured[way][split] = dataclasses.asdict(score(rolls, count))
                if split == "words":
                    words[way] = rolls
                shown.update()
        measured["conversation"] = _shown(words["greedy"])
        measured["critic"] = _critics(tokenizer, model, words["sampled"], tries)
        measured["text_loss"] = text_loss(model)
        model.save_pretrained(place.out / stage)
        self.found[stage] = json.loads(json.dumps(measured))
        replace_file(self._file, (json.dumps(self.found, indent=1) + "\n").encode())

    @property
    def conversation(self) -> str:
        """One of the last stage, with its special tokens."""
        return self.found[list(self.found)[-1]]["conversation"]

    def table(self) -> str:
        """As `table`, of this run alone."""
        return table([self.found])


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """In percent: success by stage, way, split and family; of those that can be verified the mean,
    and the share of tasks that all tries did (pass^k) and that any did (pass@k); calls that nobody
    can carry out, episodes within their budget; then the critic's accuracy and the loss on text. Of
    several runs, which have the same stages, the mean, and below it the least and the most.

    Parameters
    ----------
    runs : sequence of mapping
        As in ``results.json``.
    """
    heads = [*FAMILIES, "verifiable", "pass^k", "pass@k", "malformed", "undeclared", "in budget"]
    widths = [max(7, len(head)) for head in heads]
    lines = [_line("", [f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)])]
    for stage, way, split in [(s, way, split) for s in runs[0] for way in WAYS for split in SPLITS]:
        shares = [_shares(run[stage][way][split]) for run in runs]
        columns = list(zip(widths, *shares, strict=True))
        means = [f"{100 * sum(some) / len(some):{width}.1f}" for width, *some in columns]
        lines.append(_line(f"{stage:12}{way:9}{split}", means))
        if len(runs) > 1:
            ranges = (f"{100 * min(some):.0f}-{100 * max(some):.0f}" for _, *some in columns)
            lines.append(
                _line("", [f"{one:>{width}}" for one, width in zip(ranges, widths, strict=True)])
            )
    for stage in runs[0]:
        judged = (_critic(name, [run[stage]["critic"][name] for run in runs]) for name in CRITICS)
        text = sum(run[stage]["text_loss"] for run in runs) / len(runs)
        lines.append(f"{stage:12}critic: {', '.join(judged)}; text {text:.3f} nats a byte")
    return "\n".join(lines)


def _line(head: str, cells: Sequence[str]) -> str:
    return " ".join([f"{head:29}", *cells]).rstrip()


def _shares(found: Mapping[str, Any]) -> list[float]:
    calls = max(1, found["calls"])
    known = [family for family in FAMILIES if family != TELL]
    return [
        *(found["success"][family] for family in FAMILIES),
        *(sum(found[of][one] for one in known) / len(known) for of in ("success", "every", "some")),
        found["malformed"] / calls,
        found["undeclared"] / calls,
        found["in_budget"],
    ]


def _critic(name: str, some: Sequence[Mapping[str, Any]]) -> str:
    """Over all pairs of all runs."""
    pairs = sum(one["pairs"] for one in some)
    right, bias = (
        sum(one[key] * one["pairs"] for one in some) / max(1, pairs) for key in ("accuracy", "bias")
    )
    return f"{name} {100 * right:.1f} % of {pairs} (bias {bias:+.2f})"


def _critics(
    tokenizer: ByteTokenizer, model: KimiK2, rolls: list[Rollout], tries: int
) -> dict[str, Any]:
    groups = [rolls[start : start + tries] for start in range(0, len(rolls), tries)]
    told = [group for group in groups if group[0].episode.task.family == TELL]
    known = [group for group in groups if group[0].episode.task.family != TELL]
    return {
        name: dataclasses.asdict(agreement(Critic(tokenizer), model, some))
        for name, some in zip(CRITICS, (known, told, scripted(SCRIPTED)), strict=True)
    }


def _shown(rolls: list[Rollout]) -> str:
    """A conversation in which the user wanted something done."""
    return next(roll for roll in rolls if roll.episode.task.rubric.calls).episode.chat.text
