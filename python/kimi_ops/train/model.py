# SPDX-License-Identifier: MIT
"""What a rank has of a run's model: all of it, its experts, its layers, or its experts of those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2, Stage, load_stage
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.settings import TrainSettings


def drawn_model(settings: TrainSettings, ranks: Ranks, device: torch.device) -> KimiK2 | Stage:
    """With the weights of the settings' seed."""
    config, dtype = settings.model_config(), getattr(torch, settings.weights)
    layers, spread = ranks.layers(config), spread_experts(settings, ranks, device)
    whole = KimiK2(config, device="meta", dtype=dtype, expert_ranks=spread)
    model = whole if ranks.stages is None else Stage(whole, layers, **_options(settings, ranks))
    model.allocate(device)
    model.init_weights(settings.seed)
    return model


def loaded_model(
    folder: Path,
    settings: TrainSettings,
    ranks: Ranks,
    device: torch.device,
    spread: ExpertRanks | None,
) -> KimiK2 | Stage:
    """With the weights of a checkpoint; `spread` as of `spread_experts`."""
    if ranks.stages is None:
        return KimiK2.from_pretrained(folder, device=device, expert_ranks=spread)
    layers, options = ranks.layers(settings.model_config()), _options(settings, ranks)
    return load_stage(folder, layers, device=device, expert_ranks=spread, **options)


def _options(settings: TrainSettings, ranks: Ranks) -> dict[str, Any]:
    return {"micro_batches": settings.accumulate, "stages": ranks.stages}


def spread_experts(
    settings: TrainSettings, ranks: Ranks, device: torch.device
) -> ExpertRanks | None:
    """The way to the experts of a run's model, wide enough for its micro-batches."""
    tokens = settings.sequences // ranks.layout.dp * settings.window
    return ranks.spread(settings.model_config(), tokens, device)
