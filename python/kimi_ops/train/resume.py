# SPDX-License-Identifier: MIT
"""What a resumed run keeps of its checkpoint, and what it may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.train.checkpoint import CheckpointError, load_optimizer
from kimi_ops.train.data import Corpus, standard_library
from kimi_ops.train.settings import FIXED, TrainSettings
from kimi_ops.train.trainer import Trainer


def resumed_settings(
    state: dict[str, Any], requested: dict[str, Any], say: Callable[[str], None]
) -> TrainSettings:
    """The settings of a checkpoint with those that `requested` changes; every change is said.

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
    for name in changed:
        note = "; the learning rate follows the schedule of the new total" * (name == "steps")
        say(f"{name} {getattr(saved, name)} -> {getattr(settings, name)}{note}")
    return settings


def resumed_trainer(
    checkpoint: Path,
    state: dict[str, Any],
    settings: TrainSettings,
    corpus: Corpus,
    device: torch.device,
) -> Trainer:
    """The trainer as the checkpoint left it, on any device."""
    if state["data"]["fingerprint"] != corpus.fingerprint:
        raise CheckpointError(
            f"train: --data: the run read {state['data']['source']}, whose content differs from "
            f"that of {corpus.source}; resume with the same text"
        )
    trainer = Trainer(settings, KimiK2.from_pretrained(checkpoint, device=device))
    load_optimizer(checkpoint, state, trainer.optimizer)
    trainer.apply_settings()
    return trainer


def saved_source(state: dict[str, Any]) -> Path | None:
    """The text that a run read, as `data` of :func:`kimi_ops.train.train`."""
    source = Path(state["data"]["source"])
    default = state["data"].get("default", source == standard_library())
    return None if default else source
