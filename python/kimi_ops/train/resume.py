# SPDX-License-Identifier: MIT
"""What a resumed run keeps of its checkpoint, and what it may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.train.checkpoint import CheckpointError, load_optimizer
from kimi_ops.train.data import Corpus, standard_library
from kimi_ops.train.model import loaded_model, spread_experts
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.settings import FIXED, TrainSettings
from kimi_ops.train.trainer import Trainer


def resumed_settings(
    state: dict[str, Any],
    requested: dict[str, Any],
    say: Callable[[str], None],
    processes: int = 1,
) -> TrainSettings:
    """The settings of a checkpoint with those that `requested` changes; every change is said.

    The number of threads stays while that of `processes` does; another one has another share of the
    processors, and its own bits.

    Raises
    ------
    CheckpointError
        Settings that this version does not know.
    ValueError
        A change that would make another run of it, or a number out of range.
    """
    try:
        saved = TrainSettings(**state["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"train: checkpoint: expected settings of this version, got {error}; resume with the "
            "version that wrote it"
        ) from error
    # 0: no number asked for, the run keeps its own
    automatic = {name for name in ("threads", "window") if requested.get(name) == 0}
    wanted = {name: value for name, value in requested.items() if name not in automatic}
    before = state.get("processes", 1)
    if before != processes:
        say(f"processes {before} -> {processes}")
        wanted = {"threads": 0, **wanted}
    settings = dataclasses.replace(saved, **wanted)
    changed = [name for name in wanted if getattr(settings, name) != getattr(saved, name)]
    for name in changed:
        old, new = getattr(saved, name), getattr(settings, name)
        if name in FIXED:
            raise ValueError(
                f"train: --{name.replace('_', '-')}: expected {old}, with which the run was "
                f"started, got {new}: {FIXED[name]}; leave it out, or start another run with "
                "another --out"
            )
    if settings.windows_per_step != saved.windows_per_step:
        raise ValueError(
            f"train: --sequences, --accumulate: expected a product of {saved.windows_per_step}, "
            f"with which the run was started, got {settings.sequences} x {settings.accumulate}: it "
            "decides which text every step sees; change both, or start another run"
        )
    if settings.steps < state["step"]:
        raise ValueError(
            f"train: --steps: expected at least the {state['step']} steps made, got "
            f"{settings.steps}; raise it, or resume from an older step_* folder"
        )
    for name in (name for name in changed if name in requested):
        note = "; the learning rate follows the schedule of the new total" * (name == "steps")
        say(f"{name} {getattr(saved, name)} -> {getattr(settings, name)}{note}")
    return settings


def resumed_trainer(
    checkpoint: Path,
    state: dict[str, Any],
    settings: TrainSettings,
    device: torch.device,
    ranks: Ranks,
) -> Trainer:
    """The trainer as the checkpoint left it, on any device and any number of ranks."""
    spread = spread_experts(settings, ranks, device)
    with ranks.together():
        check_model(checkpoint, settings)
        model = loaded_model(checkpoint, settings, ranks, device, spread)
    trainer = Trainer(settings, model, ranks=ranks)
    load_optimizer(checkpoint, state, trainer.optimizer)
    trainer.apply_settings()
    return trainer


def check_model(checkpoint: Path, settings: TrainSettings) -> None:
    """Refuse a checkpoint of another model than that of its settings."""
    file, expected = checkpoint / "config.json", settings.model_config().to_dict()
    came = KimiK2Config.from_file(file).to_dict()
    shape = expected.keys() - {"model_type", "architectures"}  # names of the same network
    if other := sorted(name for name in shape if came.get(name) != expected[name]):
        name = other[0]
        raise CheckpointError(
            f"train: checkpoint: expected the model {settings.preset}, got {file} with {name} "
            f"{came.get(name)} in place of {expected[name]}; resume with the run's own files"
        )


def check_text(state: dict[str, Any], corpus: Corpus) -> None:
    """Refuse another text than the run read."""
    if state["data"]["fingerprint"] != corpus.fingerprint:
        raise CheckpointError(
            f"train: --data: the run read {state['data']['source']}, whose content differs from "
            f"that of {corpus.source}; resume with the same text"
        )


def saved_source(state: dict[str, Any]) -> Path | None:
    """The text that a run read, as `data` of :func:`kimi_ops.train.train`."""
    source = Path(state["data"]["source"])
    default = state["data"].get("default", source == standard_library())
    return None if default else source
