# SPDX-License-Identifier: MIT
"""What every stage of a run came to: a file of numbers, a table of them, one conversation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kimi_ops.agentic.evaluate import SPLITS, held_out_tasks, score
from kimi_ops.agentic.rollout import Rollout, roll_out
from kimi_ops.agentic.stages import Place
from kimi_ops.agentic.tasks import FAMILIES
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import ByteTokenizer

__all__ = ["Results"]

WAYS = {"greedy": 0.0, "sampled": 1.0}  # temperatures


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

    def add(self, place: Place, stage: str, seconds: float, model: KimiK2, episodes: int) -> None:
        """Evaluate the model that a stage made, unless that was done; keep it as a checkpoint."""
        if stage in self.found:
            return
        measured: dict[str, Any] = {"seconds": round(seconds, 1)}
        with tqdm(
            total=len(SPLITS) * len(WAYS), desc=f"after {stage}", disable=not place.bar, leave=False
        ) as shown:
            for way, temperature in WAYS.items():
                measured[way] = {}
                for split in SPLITS:
                    tasks = held_out_tasks(split, episodes)
                    rolls = roll_out(model, ByteTokenizer(), tasks, temperature=temperature)
                    measured[way][split] = dataclasses.asdict(score(rolls))
                    if (way, split) == ("greedy", "words"):
                        measured["conversation"] = _shown(rolls)
                    shown.update()
        model.save_pretrained(place.out / stage)
        self.found[stage] = json.loads(json.dumps(measured))
        self._file.write_text(json.dumps(self.found, indent=1) + "\n")

    @property
    def conversation(self) -> str:
        """One of the last stage, with its special tokens."""
        return self.found[list(self.found)[-1]]["conversation"]

    def table(self) -> str:
        """Success in percent by stage, way, split and family, and calls that nobody can carry
        out."""
        heads = [*FAMILIES, "malformed", "undeclared", "in budget"]
        lines = [" ".join([f"{'':24}", *(f"{head:>{max(6, len(head))}}" for head in heads)])]
        for stage, measured in self.found.items():
            for way in WAYS:
                for split, found in measured[way].items():
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
                    lines.append(" ".join([f"{stage:5}{way:9}{split:10}", *cells]))
        return "\n".join(lines)


def _shown(rolls: list[Rollout]) -> str:
    """A conversation in which the user wanted something done."""
    return next(roll for roll in rolls if roll.episode.task.rubric.calls).episode.chat.text
