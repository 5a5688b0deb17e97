# SPDX-License-Identifier: MIT
"""The stages of the command, each taken up where it was left."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from kimi_ops.agentic.critic import Critic
from kimi_ops.agentic.learner import Learner
from kimi_ops.agentic.progress import RlStep
from kimi_ops.agentic.rl import Judges, Rl, RlSettings
from kimi_ops.agentic.sft import Example, Sft, SftSettings, SftStep, Source
from kimi_ops.agentic.synthesis import read_attempts, synthesise, training_tools
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.chat import Tokenizer, declare_typescript, render
from kimi_ops.train.checkpoint import replace_file
from kimi_ops.train.data import load_corpus

__all__ = ["LR", "SAVE_SFT", "Place", "reinforced", "supervised", "synthesised"]

SAVE_SFT = 100  # updates
LR = 0.012
TEXT_SHARE = 0.1  # of what reinforcement replays


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files, and whom it tells."""

    out: Path
    say: Callable[[str], None]
    bar: bool


class _Stage(Protocol):
    @property
    def made(self) -> int: ...

    @property
    def finished(self) -> bool: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def synthesised(
    place: Place, attempts: int, seed: int, tokenizer: Tokenizer
) -> tuple[list[Example], list[Example]]:
    """The kept attempts, and comparisons for a critic, as ids."""
    path = place.out / "attempts.jsonl"
    counted = synthesise(path, attempts, seed)
    for funnel in tqdm(  # noqa: B007
        counted, "synthesis", attempts, disable=not place.bar, leave=False
    ):
        pass
    good, tried = sum(funnel.kept.values()), sum(funnel.attempts.values())
    place.say(f"synthesis  {good} of {tried} attempts kept")
    for family, count in sorted(funnel.attempts.items()):
        reasons = [(n, why) for (f, why), n in funnel.reasons.items() if f == family]
        least = ", ".join(f"{n} {why}" for n, why in sorted(reasons, reverse=True))
        place.say(f"  {family:8} {funnel.kept[family]:5} of {count:5}   {least}")
    lines = read_attempts(path)
    kept = [
        render(line["messages"], line["tools"], declare=declare_typescript).encode(tokenizer)
        for line in lines
        if not line["reasons"]
    ]
    return kept, Critic(tokenizer).synthesised(lines)


def supervised(
    place: Place,
    model: KimiK2,
    trajectories: list[Example],
    pairs: list[Example],
    settings: SftSettings,
) -> float:
    """Train the model on trajectories and comparisons; the seconds it took in all."""
    stage = Sft(Learner(model, LR), trajectories, settings, text=text(), pairs=pairs)
    recent: deque[float] = deque(maxlen=50)

    def note(made: SftStep) -> str:
        recent.append(made.loss)
        return f"{made.stage}, loss {sum(recent) / len(recent):.3f}"

    seconds = _run(place, "sft", stage, settings.steps, SAVE_SFT, note)
    loss = f", loss {sum(recent) / len(recent):.3f} at the end" if recent else ""
    place.say(f"sft        {stage.made} updates in {seconds:.0f} s{loss}")
    return seconds


def reinforced(
    place: Place,
    model: KimiK2,
    tokenizer: Tokenizer,
    critic: Judges,
    trajectories: list[Example],
    settings: RlSettings,
    *,
    name: str = "rl",
) -> float:
    """Reinforce the model; the seconds it took in all. `name`.jsonl has a line a step."""
    learner = Learner(model, settings.lr * LR, bias_rate=0)
    replay = _either(trajectories, text())
    stage = Rl(learner, tokenizer, critic, training_tools(), settings, replay=replay)

    def note(made: RlStep) -> str:
        return f"success {made.success:.2f}, malformed {made.malformed:.2f}"

    def tell() -> None:
        lines = [json.dumps(dataclasses.asdict(made)) + "\n" for made in stage.history]
        replace_file(place.out / f"{name}.jsonl", "".join(lines).encode())

    seconds = _run(place, name, stage, settings.steps, 1, note, tell)
    updates = settings.epochs * settings.minibatches
    taught = sum(made.loss is not None for made in stage.history)
    place.say(f"{name:10} {stage.made} steps, {taught * updates} updates, in {seconds:.0f} s")
    return seconds


def _run(
    place: Place,
    name: str,
    stage: _Stage,
    steps: int,
    every: int,
    note: Callable[[Any], str],
    tell: Callable[[], None] = lambda: None,
) -> float:
    """Take a stage to its end, saved every so many steps; seconds in all. `tell` writes down what
    the stage has found so far: where it is taken up, and after each step."""
    file, seconds = place.out / f"{name}.pt", 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        stage.load_state_dict(state)
        seconds = state["seconds"]
    tell()  # a run that ended between the two files of a step has one line too many
    begun = time.monotonic() - seconds
    with tqdm(
        total=steps, initial=stage.made, desc=name, disable=not place.bar, leave=False
    ) as shown:
        while not stage.finished:
            shown.set_postfix_str(note(stage.step()))
            shown.update()
            tell()
            if stage.made % every == 0 or stage.finished:
                seconds = time.monotonic() - begun
                content = io.BytesIO()
                torch.save({**stage.state_dict(), "seconds": seconds}, content)
                replace_file(file, content.getvalue())
    return seconds


def text(length: int = 128) -> Source:
    """Python's own sources, which the model is to know as well."""
    known = load_corpus(None, window=length).train

    def window(rng: random.Random) -> Example:
        start = rng.randrange(len(known) - length)
        return [int(one) for one in known[start : start + length]], [True] * length

    return window


def _either(trajectories: list[Example], text: Source) -> Source:
    def one(rng: random.Random) -> Example:
        return text(rng) if rng.random() < TEXT_SHARE else rng.choice(trajectories)

    return one
