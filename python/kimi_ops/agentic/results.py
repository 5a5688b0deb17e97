# SPDX-License-Identifier: MIT
"""What every stage of a run came to: a file of numbers, a table of them, one conversation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kimi_ops.agentic.critic import Critic
from kimi_ops.agentic.evaluate import SPLITS, agreement, held_out_tasks, score, text_loss
from kimi_ops.agentic.progress import TELL
from kimi_ops.agentic.rollout import Rollout, roll_out
from kimi_ops.agentic.stages import Place
from kimi_ops.agentic.tasks import FAMILIES
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import ByteTokenizer
from kimi_ops.train.checkpoint import replace_file

__all__ = ["Results"]

WAYS = ("greedy", "sampled")


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

        Greedy, one try at a task; drawn at temperature 1, several. The critic's accuracy is that on
        pairs of the latter with held-out words.
        """
        if stage in self.found:
            return
        tokenizer, words = ByteTokenizer(), dict[str, list[Rollout]]()
        measured: dict[str, Any] = {"seconds": round(seconds, 1), "greedy": {}, "sampled": {}}
        with tqdm(
            total=len(SPLITS) * len(WAYS), desc=f"after {stage}", disable=not place.bar, leave=False
        ) as shown:
            for way, split in [(way, split) for way in WAYS for split in SPLITS]:
                count, temperature = (1, 0.0) if way == "greedy" else (tries, 1.0)
                tasks = [one for one in held_out_tasks(split, episodes) for _ in range(count)]
                rolls = roll_out(model, tokenizer, tasks, temperature=temperature)
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
        """In percent: success by stage, way, split and family, calls that nobody can carry out,
        episodes within their budget; then the critic's accuracy and the loss on text."""
        heads = [*FAMILIES, "malformed", "undeclared", "in budget"]
        lines = [" ".join([f"{'':28}", *(f"{head:>{max(6, len(head))}}" for head in heads)])]
        for stage, way in [(stage, way) for stage in self.found for way in WAYS]:
            for split, found in self.found[stage][way].items():
                calls = max(1, found["calls"])
                shares = [
                    *(found["success"][family] for family in FAMILIES),
                    found["malformed"] / calls,
                    found["undeclared"] / calls,
                    found["in_budget"],
                ]
                cells = (
                    f"{100 * share:{max(6, len(head))}.1f}"
                    for head, share in zip(heads, shares, strict=True)
                )
                lines.append(" ".join([f"{stage:12}{way:8}{split:8}", *cells]))
        for stage, measured in self.found.items():
            judged = ", ".join(
                f"{name} {100 * one['accuracy']:.1f} % of {one['pairs']} (bias {one['bias']:+.2f})"
                for name, one in measured["critic"].items()
            )
            lines.append(
                f"{stage:12}critic: {judged}; text {measured['text_loss']:.3f} nats a byte"
            )
        return "\n".join(lines)


def _critics(
    tokenizer: ByteTokenizer, model: KimiK2, rolls: list[Rollout], tries: int
) -> dict[str, Any]:
    groups = [rolls[start : start + tries] for start in range(0, len(rolls), tries)]
    told = [group for group in groups if group[0].episode.task.family == TELL]
    known = [group for group in groups if group[0].episode.task.family != TELL]
    return {
        name: dataclasses.asdict(agreement(Critic(tokenizer), model, some))
        for name, some in (("verifiable", known), (TELL, told))
    }


def _shown(rolls: list[Rollout]) -> str:
    """A conversation in which the user wanted something done."""
    return next(roll for roll in rolls if roll.episode.task.rubric.calls).episode.chat.text
