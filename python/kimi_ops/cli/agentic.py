# SPDX-License-Identifier: MIT
"""``kimi-ops agentic``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from kimi_ops.cli.options import fail

__all__ = ["agentic"]


def agentic(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/agentic"),
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights and batches.")] = 0,
    attempts: Annotated[
        int | None, typer.Option(min=100, help="Of the teacher. [default: 8000]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates of the supervised stage. [default: 1500]")
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(min=1, help="To evaluate, for each family and split. [default: 12]"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every stage, too short to learn much.")
    ] = False,
) -> None:
    """Teach a small model to use tools it has never seen: synthesise, train, evaluate.

    A run that was broken off goes on where it was.
    """
    from kimi_ops.agentic.demo import DemoSettings, demo

    settings = DemoSettings.quick(seed) if quick else DemoSettings(seed=seed)
    sft = settings.sft if steps is None else dataclasses.replace(settings.sft, steps=steps)
    settings = DemoSettings(
        settings.attempts if attempts is None else attempts,
        dataclasses.replace(sft, seed=seed),
        settings.episodes if episodes is None else episodes,
        seed,
    )
    try:
        demo(out, settings, say=typer.echo, bar=sys.stderr.isatty())
    except (ValueError, FloatingPointError, OSError) as error:
        raise fail(error) from error
