# SPDX-License-Identifier: MIT
"""``kimi-ops plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_ops.cli.options import fail, option
from kimi_ops.models.kimi_k2.config import presets
from kimi_ops.plan import HARDWARE
from kimi_ops.plan import plan as make
from kimi_ops.plan.plot import plot_plan
from kimi_ops.plan.report import as_dict, as_text
from kimi_ops.train.plot import require_matplotlib


def plan(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(presets.NAMES)} or a config.json.")
    ] = "k2",
    hardware: Annotated[
        str, typer.Option(help=f"{', '.join(HARDWARE)}, or a JSON file that describes one.")
    ] = "h200",
    gpus: Annotated[int, typer.Option(help="How many.")] = 256,
    mode: Annotated[str, typer.Option(help="train, prefill, or decode (serve).")] = "train",
    tokens_per_rank: Annotated[
        int | None,
        option("Tokens of a micro-batch or prompts; sequences that decode.", "4096; 128 to decode"),
    ] = None,
    skew: Annotated[float, typer.Option(help="Rows of the busiest rank by the mean.")] = 1.0,
    loads: Annotated[
        Path | None,
        option("Measured skew: tokens of each expert, by layer, as JSON.", "none"),
    ] = None,
    redundant: Annotated[int, typer.Option(help="Replicas of busy experts that serve.")] = 0,
    context: Annotated[
        int | None, option("Tokens of a sequence.", "4096, or fewer where the model has fewer")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Of a training step.")] = 2**26,
    weights: Annotated[
        str | None, option("bf16, fp8 or int4 experts.", "bf16 to train, fp8 to serve")
    ] = None,
    wire: Annotated[
        str | None, option("Dispatched rows: bf16 or fp8.", "bf16 to train, fp8 to serve")
    ] = None,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Train on micro-batches in twos, side by side.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    plot: Annotated[
        Path | None, option("Draw times and memory: a png, svg or pdf.", "none")
    ] = None,
) -> None:
    """Predict memory, bytes by link and times of a run on many GPUs, and choose a layout."""
    named: dict[str, Any] = {"mode": mode, "weights": weights, "wire": wire}  # checked there
    try:
        if plot is not None:
            require_matplotlib()
        made = make(
            model,
            hardware,
            gpus,
            tokens_per_rank=tokens_per_rank,
            skew=skew,
            loads=None if loads is None else _read(loads),
            redundant=redundant,
            context=context,
            batch_tokens=batch_tokens,
            overlap=overlap,
            **named,
        )
        typer.echo(json.dumps(as_dict(made), indent=2) if as_json else as_text(made))
        if plot is not None:
            typer.echo(f"drawn: {plot_plan(made, plot)}", err=True)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise fail(error) from None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"plan: loads: expected JSON, got {path}: {error}; write ExpertLoads.totals.tolist()"
        ) from None
