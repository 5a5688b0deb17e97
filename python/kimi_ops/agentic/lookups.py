# SPDX-License-Identifier: MIT
"""What everything else needs: a model that was taught single look-ups alone, and how often it is
right with tools and words that it has not seen."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from kimi_ops.agentic.evaluate import SPLITS, Score, evaluate, held_out_tasks
from kimi_ops.agentic.learner import Learner
from kimi_ops.agentic.sft import Example, Sft, SftSettings
from kimi_ops.agentic.stages import LR
from kimi_ops.agentic.synthesis import training_tools
from kimi_ops.agentic.tasks import make_task
from kimi_ops.agentic.teacher import play
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import ByteTokenizer

__all__ = ["SETTINGS", "Lookups", "lookups"]

SETTINGS = SftSettings(steps=1300)
DECLARED = (1, 2)  # tools


@dataclass(frozen=True)
class Lookups:
    """
    Attributes
    ----------
    seconds : float
        Of the training; making data and evaluating come on top.
    found : dict
        By split and number of declared tools, of greedy episodes.
    """

    seconds: float
    found: dict[tuple[str, int], Score]

    def table(self) -> str:
        """Percent that are right, by split and number of tools, and calls that went wrong."""
        lines = [f"trained in {self.seconds:.0f} s", f"{'':10}{'tools':>6}{'right %':>9}  calls"]
        for (split, declared), score in self.found.items():
            lines.append(
                f"{split:10}{declared:6}{100 * score.success['lookup']:9.1f}  {score.calls}, of "
                f"which {score.malformed} malformed, {score.undeclared} undeclared, "
                f"{score.invalid} invalid"
            )
        return "\n".join(lines)


def lookups(
    model: KimiK2,
    settings: SftSettings,
    *,
    examples: int = 4000,
    episodes: int = 48,
    say: Callable[[str], None] = print,
    bar: bool = True,
) -> Lookups:
    """Train a model on look-ups alone, and evaluate it on each split with one tool and with two.

    Parameters
    ----------
    model : KimiK2
    settings : SftSettings
        Their seed is that of the data too.
    examples : int
        To train on.
    episodes : int
        Of each evaluation.
    say : callable
        Receives the table.
    bar : bool
        Show progress on stderr.
    """
    tokenizer = ByteTokenizer()
    stage = Sft(Learner(model, LR), _made(examples, settings.seed, tokenizer), settings)
    begun = time.monotonic()
    with tqdm(total=settings.steps, desc="look-ups", disable=not bar, leave=False) as shown:
        while not stage.finished:
            made = stage.step()
            shown.set_postfix_str(f"{made.stage}, loss {made.loss:.3f}")
            shown.update()
    seconds = time.monotonic() - begun
    found = {}
    for split in SPLITS:
        for declared in DECLARED:
            tasks = held_out_tasks(split, episodes, families=("lookup",), declared=declared)
            found[split, declared] = evaluate(model, tokenizer, tasks)
    results = Lookups(seconds, found)
    say(results.table())
    return results


def _made(count: int, seed: int, tokenizer: ByteTokenizer) -> list[Example]:
    """The teacher's, without errors; every third one with one tool."""
    tools, rng = training_tools(), random.Random(f"look-ups {seed}")
    made = []
    for place in range(count):
        declared = DECLARED[place % 3 > 0]
        task = make_task("lookup", tools, rng, fresh=False, declared=declared)
        made.append(play(task, rng).chat.encode(tokenizer))
    return made
