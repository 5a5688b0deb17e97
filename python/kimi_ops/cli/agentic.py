# SPDX-License-Identifier: MIT
"""``kimi-ops agentic``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_ops.cli.options import fail

__all__ = ["agentic"]


def agentic(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/agentic"),
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights and batches.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Runs, from --seed on, in folders of their own; and their means."),
    ] = 1,
    attempts: Annotated[
        int | None, typer.Option(min=100, help="Of the teacher. [default: 8000]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates of the supervised stage. [default: 2400]")
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(min=1, help="To evaluate, for each family and split. [default: 12]"),
    ] = None,
    rl_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of reinforcement. [default: 16]")
    ] = None,
    stage: Annotated[str, typer.Option(help="The last one to run: synthesis, sft or rl.")] = "rl",
    study: Annotated[
        bool,
        typer.Option("--study", help="Reinforcement under every judge."),
    ] = False,
    lookups: Annotated[
        bool,
        typer.Option("--lookups", help="Teach single look-ups alone, and say how many are right."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every stage, too short to learn much.")
    ] = False,
) -> None:
    """Teach a small model to use tools it has never seen: synthesise, train, reinforce, evaluate.

    A run that was broken off goes on where it was.
    """
    from kimi_ops.agentic.demo import DemoSettings, demo
    from kimi_ops.agentic.results import table
    from kimi_ops.agentic.study import ARMS

    if lookups:
        return _lookups(seed, steps, episodes)

    def run(one: int, folder: Path) -> dict[str, Any]:
        settings = DemoSettings.quick(one) if quick else DemoSettings(seed=one)
        settings = dataclasses.replace(
            settings,
            attempts=attempts or settings.attempts,
            sft=dataclasses.replace(settings.sft, steps=steps or settings.sft.steps, seed=one),
            rl=dataclasses.replace(settings.rl, steps=rl_steps or settings.rl.steps, seed=one),
            episodes=episodes or settings.episodes,
        )
        arms = tuple(ARMS) if study else ("refined",)
        bar = sys.stderr.isatty()
        return demo(folder, settings, say=typer.echo, bar=bar, last=stage, arms=arms)

    try:
        if seeds == 1:
            run(seed, out)
            return
        found = [run(one, out / f"seed-{one}") for one in range(seed, seed + seeds)]
        if stage != "synthesis":
            typer.echo(f"of {seeds} seeds\n{table(found)}")
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        raise fail(error) from error


def _lookups(seed: int, steps: int | None, episodes: int | None) -> None:
    from kimi_ops.agentic.demo import small_model
    from kimi_ops.agentic.lookups import SETTINGS, lookups

    settings = dataclasses.replace(SETTINGS, steps=steps or SETTINGS.steps, seed=seed)
    lookups(
        small_model(seed),
        settings,
        episodes=episodes or 48,
        say=typer.echo,
        bar=sys.stderr.isatty(),
    )
