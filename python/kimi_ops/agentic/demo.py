# SPDX-License-Identifier: MIT
"""All stages one after the other, each taken up where it was left."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_ops.agentic.critic import Critic
from kimi_ops.agentic.figures import draw
from kimi_ops.agentic.results import Results
from kimi_ops.agentic.rl import RlSettings
from kimi_ops.agentic.settings import at_least
from kimi_ops.agentic.sft import SftSettings
from kimi_ops.agentic.stages import Place, reinforced, supervised, synthesised
from kimi_ops.agentic.study import ARMS
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.chat import ByteTokenizer
from kimi_ops.train.checkpoint import replace_file

__all__ = ["STAGES", "DemoSettings", "demo", "small_model"]

STAGES = ("synthesis", "sft", "rl")


@dataclass(frozen=True)
class DemoSettings:
    """
    Attributes
    ----------
    attempts : int
        Of the teacher.
    sft : SftSettings
    rl : RlSettings
    episodes, tries : int
        Of an evaluation: tasks for each family and split, and how often each is tried where answers
        are drawn.
    seed : int
    """

    attempts: int = 8000
    sft: SftSettings = SftSettings()
    rl: RlSettings = RlSettings()
    episodes: int = 12
    tries: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, {"attempts": 1, "episodes": 1, "tries": 1})

    @classmethod
    def quick(cls, seed: int = 0) -> DemoSettings:
        """Every stage, too short to learn much."""
        rl = RlSettings(steps=2, groups=3, told=1, tries=3)
        return cls(600, SftSettings(steps=60), rl, episodes=1, tries=2, seed=seed)


def small_config() -> KimiK2Config:
    """`mini` on bytes, made to copy: two thirds of a query for positions, which turn faster, wider
    latents, and fewer experts."""
    return dataclasses.replace(
        KimiK2Config.mini(),
        vocab_size=256,
        intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=96,
        kv_lora_rank=96,
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
    last: str = STAGES[-1],
    arms: Sequence[str] = ("refined",),
) -> dict[str, Any]:
    """Synthesise, train, evaluate, reinforce, evaluate; what was done before is not done again.

    Parameters
    ----------
    out : Path
        ``attempts.jsonl``; of each stage ``sft.pt`` and ``rl.pt``, to go on from, and the model as
        a checkpoint, ``sft`` and ``rl``; ``rl.jsonl``, a line a step; ``results.json``; figures.
    settings : DemoSettings
    say : callable
        Receives the lines for the user.
    bar : bool
        Show progress on stderr.
    model : callable
        Makes the model of a seed.
    last : str
        The stage to end with.
    arms : sequence of str
        Judges of reinforcement, each from the same supervised model: keys of `study.ARMS`.

    Returns
    -------
    dict
        As in ``results.json``.

    Raises
    ------
    ValueError
        A stage or an arm that there is not, a folder of other settings.
    ImportError
        matplotlib is not installed; everything else was done.
    """
    if last not in STAGES:
        raise ValueError(
            f"agentic: stage: expected {' | '.join(STAGES)}, got {last!r}; name the last to run"
        )
    if not arms or not all(arm in ARMS for arm in arms):
        raise ValueError(
            f"agentic: arms: expected one or more of {' | '.join(ARMS)}, got {list(arms)}; name "
            "the judges to reinforce under"
        )
    _same_settings(out, settings)
    place, tokenizer, results = Place(out, say, bar), ByteTokenizer(), Results(out)
    trajectories, pairs = synthesised(place, settings.attempts, settings.seed, tokenizer)
    if last == "synthesis":
        return results.found
    trained = model(settings.seed)
    seconds = supervised(place, trained, trajectories, pairs, settings.sft)
    results.add(place, "sft", seconds, trained, settings.episodes, settings.tries)
    for arm in arms if last == "rl" else ():
        name = "rl" if arm == "refined" else f"rl-{arm}"
        trained = KimiK2.from_pretrained(out / "sft")
        critic = ARMS[arm](Critic(tokenizer), trained)
        seconds = reinforced(
            place, trained, tokenizer, critic, trajectories, settings.rl, name=name
        )
        results.add(place, name, seconds, trained, settings.episodes, settings.tries)
    say(results.conversation)
    say(results.table())
    for path in draw(out):
        say(f"figure     {path}")
    return results.found


def _same_settings(out: Path, settings: DemoSettings) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file, wanted = out / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if not file.exists():
        replace_file(file, (json.dumps(wanted, indent=1) + "\n").encode())
    elif (found := json.loads(file.read_text())) != wanted:
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        raise ValueError(
            f"agentic: {out}: expected the settings it was begun with, {', '.join(other)} differ; "
            "choose another folder"
        )
