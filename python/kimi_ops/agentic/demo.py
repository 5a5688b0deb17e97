# SPDX-License-Identifier: MIT
"""All stages one after the other, each taken up where it was left."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kimi_ops.agentic.evaluate import SPLITS, Score, held_out_tasks, score
from kimi_ops.agentic.learner import Learner
from kimi_ops.agentic.rollout import Rollout, roll_out
from kimi_ops.agentic.sft import Example, Sft, SftSettings
from kimi_ops.agentic.synthesis import read_attempts, synthesise
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.chat import ByteTokenizer, declare_typescript, render
from kimi_ops.train.data import load_corpus

__all__ = ["DemoSettings", "demo", "small_model"]

SAVE_EVERY = 100  # updates
LR = 0.012


@dataclass(frozen=True)
class DemoSettings:
    """
    Attributes
    ----------
    attempts : int
        Of the teacher.
    sft : SftSettings
    episodes : int
        Of the evaluation, for each family and split.
    seed : int
    """

    attempts: int = 8000
    sft: SftSettings = SftSettings()
    episodes: int = 12
    seed: int = 0

    @classmethod
    def quick(cls, seed: int = 0) -> DemoSettings:
        """Every stage, too short to learn much."""
        return cls(600, SftSettings(steps=60), 2, seed)


def small_config() -> KimiK2Config:
    """`mini` on bytes, made to copy: half the width of a head for positions, which turn faster, and
    fewer experts."""
    return dataclasses.replace(
        KimiK2Config.mini(),
        vocab_size=256,
        intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.41,
        qk_nope_head_dim=16,
        qk_rope_head_dim=32,
        rope_theta=1000.0,
        rope_scaling=None,
    )


def small_model(seed: int) -> KimiK2:
    model = KimiK2(small_config())
    model.init_weights(seed)
    return model


def demo(
    out: Path,
    settings: DemoSettings,
    *,
    say: Callable[[str], None] = print,
    bar: bool = True,
    model: Callable[[int], KimiK2] = small_model,
) -> dict[str, Any]:
    """Synthesise, train, evaluate; what was done before is not done again.

    Parameters
    ----------
    out : Path
        ``attempts.jsonl``, ``sft.pt``, ``sft`` (a checkpoint of the model), ``results.json``.
    settings : DemoSettings
    say : callable
        Receives the lines for the user.
    bar : bool
        Show progress on stderr.
    model : callable
        Makes the model of a seed.

    Returns
    -------
    dict
        As in ``results.json``.
    """
    _same_settings(out, settings)
    trajectories = _synthesised(out, settings, say, bar)
    trained = model(settings.seed)
    seconds = _trained(out, trained, trajectories, settings, say, bar)
    results: dict[str, Any] = {"sft_seconds": round(seconds, 1), "splits": {}}
    tokenizer = ByteTokenizer()
    for split in SPLITS:
        rolls = roll_out(trained, tokenizer, held_out_tasks(split, settings.episodes))
        found = score(rolls)
        results["splits"][split] = dataclasses.asdict(found)
        say(_line(split, found))
        if split == "words":
            say(_shown(rolls))
    text = json.dumps(results, indent=1)
    (out / "results.json").write_text(text + "\n")
    return json.loads(text)


def _same_settings(out: Path, settings: DemoSettings) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file, wanted = out / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=1) + "\n")
    elif (found := json.loads(file.read_text())) != wanted:
        other = [name for name in wanted if wanted[name] != found.get(name)]
        raise ValueError(
            f"agentic: {out}: expected the settings it was begun with, {', '.join(other)} differ; "
            "choose another folder"
        )


def _synthesised(
    out: Path, settings: DemoSettings, say: Callable[[str], None], bar: bool
) -> list[Example]:
    """The kept attempts as ids."""
    path = out / "attempts.jsonl"
    counted = synthesise(path, settings.attempts, settings.seed)
    for funnel in tqdm(  # noqa: B007
        counted, "synthesis", settings.attempts, disable=not bar, leave=False
    ):
        pass
    kept, tried = sum(funnel.kept.values()), sum(funnel.attempts.values())
    say(f"synthesis  {kept} of {tried} attempts kept")
    for family, count in sorted(funnel.attempts.items()):
        reasons = [(n, why) for (f, why), n in funnel.reasons.items() if f == family]
        least = ", ".join(f"{n} {why}" for n, why in sorted(reasons, reverse=True))
        say(f"  {family:8} {funnel.kept[family]:5} of {count:5}   {least}")
    tokenizer = ByteTokenizer()
    return [
        render(line["messages"], line["tools"], declare=declare_typescript).encode(tokenizer)
        for line in read_attempts(path)
        if not line["reasons"]
    ]


def _text(length: int = 128) -> Callable[[random.Random], Example]:
    """Python's own sources, which the model is to know as well."""
    text = load_corpus(None, window=length).train

    def window(rng: random.Random) -> Example:
        start = rng.randrange(len(text) - length)
        return [int(one) for one in text[start : start + length]], [True] * length

    return window


def _trained(
    out: Path,
    model: KimiK2,
    trajectories: list[Example],
    settings: DemoSettings,
    say: Callable[[str], None],
    bar: bool,
) -> float:
    """Train the model; the seconds it took in all."""
    stage = Sft(Learner(model, LR), trajectories, settings.sft, text=_text())
    file, seconds = out / "sft.pt", 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        stage.load_state_dict(state)
        seconds = state["seconds"]
    begun = time.monotonic() - seconds
    recent: deque[float] = deque(maxlen=50)
    with tqdm(
        total=settings.sft.steps, initial=stage.made, desc="sft", disable=not bar, leave=False
    ) as shown:
        while not stage.finished:
            made = stage.step()
            recent.append(made.loss)
            shown.set_postfix_str(f"{made.stage}, loss {sum(recent) / len(recent):.3f}")
            shown.update()
            if made.step % SAVE_EVERY == 0 or stage.finished:
                seconds = time.monotonic() - begun
                temporary = file.with_suffix(".tmp")
                torch.save({**stage.state_dict(), "seconds": seconds}, temporary)
                os.replace(temporary, file)
    loss = f", loss {sum(recent) / len(recent):.3f} at the end" if recent else ""
    say(f"sft        {stage.made} updates in {seconds:.0f} s{loss}")
    if not (out / "sft").exists():
        model.save_pretrained(out / "sft")
    return seconds


def _line(split: str, found: Score) -> str:
    parts = [f"{family} {100 * share:.0f}" for family, share in found.success.items()]
    return (
        f"{split:8} {', '.join(parts)} %; malformed {found.malformed}, undeclared "
        f"{found.undeclared}, invalid {found.invalid} of {found.calls} calls"
    )


def _shown(rolls: list[Rollout]) -> str:
    """One conversation with its special tokens."""
    return next(roll for roll in rolls if len(roll.episode.task.rubric.calls) > 0).episode.chat.text
