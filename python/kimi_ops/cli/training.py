# SPDX-License-Identifier: MIT
"""``kimi-ops train`` and ``kimi-ops demo``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_ops._program import INTERRUPTED
from kimi_ops.cli import options as opt
from kimi_ops.gpu import DeviceError
from kimi_ops.train import CheckpointError, Diverged, TrainSettings
from kimi_ops.train import train as train_run
from kimi_ops.train.checkpoint import find_checkpoint, read_state
from kimi_ops.train.plot import plot_run, require_matplotlib
from kimi_ops.train.sample import load_model, sample_text

ERRORS = (
    ValueError,
    CheckpointError,
    DeviceError,
    FloatingPointError,
    OSError,
    ImportError,
    MemoryError,
)


@dataclass
class Request:
    """What the user asked for."""

    out: Path
    data: Path | None
    resume: bool
    device: str
    overrides: dict[str, Any]
    plot: bool
    progress: bool


def train(
    context: typer.Context,
    out: opt.Out = Path("runs/mini"),
    data: opt.Data = None,
    resume: Annotated[bool, typer.Option("--resume", help=opt.RESUME_HELP)] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the metrics at the end.")] = False,
    preset: opt.Preset = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    steps: opt.Steps = None,
    sequences: opt.Sequences = None,
    window: opt.Window = None,
    accumulate: opt.Accumulate = None,
    lr: opt.Lr = None,
    weight_decay: opt.WeightDecay = None,
    tau: opt.Tau = None,
    seed: opt.Seed = None,
    threads: opt.Threads = None,
    validate_every: opt.ValidateEvery = None,
    checkpoint_every: opt.CheckpointEvery = None,
    keep: opt.Keep = None,
    progress: opt.Bar = True,
) -> None:
    """Train a small Kimi K2 on text, byte by byte. Ctrl-C saves; --resume goes on bit for bit."""
    _train(Request(out, data, resume, device, _overrides(context), plot, progress))


def demo(
    context: typer.Context,
    out: opt.Out = Path("runs/demo"),
    data: opt.Data = None,
    steps: opt.Steps = None,
    preset: opt.Preset = None,
    window: opt.Window = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    progress: opt.Bar = True,
) -> None:
    """Train the mini model for a few minutes, plot the run, let the model write. Resumes if
    stopped."""
    overrides = _overrides(context)
    try:
        state = read_state(find_checkpoint(out)) if (out / "latest.json").exists() else None
    except CheckpointError as error:
        raise opt.fail(error) from None
    if state is not None and state["step"] >= (steps or state["settings"]["steps"]):
        typer.echo(
            f"{out} holds a finished run; showing it again (remove the folder to train anew)"
        )
    resume = state is not None
    _train(Request(out, data, resume, device, overrides, plot=True, progress=progress))
    try:
        model = load_model(out, device=device)
        text = sample_text(
            model, "import os\n\n\ndef ", max_tokens=None, temperature=0.7, top_p=0.95, seed=0
        )
    except (*ERRORS, TypeError) as error:
        raise opt.fail(error) from None
    typer.echo(f"\na sample, temperature 0.7:\n\n{text}")
    again = opt.command_line("generate", out, prompt="class ", temperature=0.5)
    typer.echo(f"\nmore: {again}")


def _overrides(context: typer.Context) -> dict[str, Any]:
    """The settings that were given on the command line."""
    given = {**context.params, "keep_checkpoints": context.params.get("keep")}
    names = TrainSettings.__dataclass_fields__
    return {name: given[name] for name in names if given.get(name) is not None}


def _train(request: Request) -> None:
    """Run, then say how it ended."""
    try:
        if request.plot:
            require_matplotlib()
        result = train_run(
            request.out,
            data=request.data,
            resume=request.resume,
            overrides=request.overrides,
            device=request.device,
            say=typer.echo,
            progress=request.progress,
        )
    except Diverged as error:
        raise opt.fail(f"{error}; {_slower(request, error.lr)}") from None
    except ERRORS as error:
        raise opt.fail(error) from None
    except KeyboardInterrupt:  # the second one: the first lets the run end by itself
        run = _saved_run(request.out)
        left = "there is no checkpoint yet" if run is None else f"go on with: {_again(run)}"
        typer.echo(f"broken off without saving; {left}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"checkpoint {result.checkpoint}\nmetrics    {result.metrics}")
    if request.plot:
        try:
            tau = read_state(result.checkpoint)["settings"]["tau"]
            out, bigram = result.metrics.parent, result.bigram_loss
            paths = plot_run(result.metrics, out, bigram=bigram, tau=tau)
        except ERRORS as error:
            raise opt.fail(error) from None
        for path in paths:
            typer.echo(f"plot       {path}")
    if not result.finished:
        again = _again(result.metrics.parent)
        typer.echo(f"stopped after step {result.step}; go on with: {again}")
        raise typer.Exit(INTERRUPTED)
    typer.echo(_table(result.validation_loss, result.bigram_loss))


def _saved_run(out: Path) -> Path | None:
    """The folder of the run that `out` means, if it can be resumed."""
    try:
        return find_checkpoint(out).parent
    except CheckpointError:
        return None


def _again(run: Path, **more: Any) -> str:
    """The command that resumes a run; it needs no other option."""
    return opt.command_line("train", out=run, resume=True, **more)


def _slower(request: Request, lr: float) -> str:
    """What to do about a diverged run, in the state that it left."""
    run = _saved_run(request.out)
    if run is not None:
        return f"go on from {find_checkpoint(run).name} with: {_again(run, lr=lr / 2)}"
    same = {"keep" if k == "keep_checkpoints" else k: v for k, v in request.overrides.items()}
    options = {**same, "plot": request.plot, "device": request.device, "lr": lr / 2}
    start = opt.command_line("train", out=request.out, data=request.data, **options)
    return f"there is no checkpoint yet; start again with: {start}"


def _table(validation: float | None, bigram: float) -> str:
    """The model against the bigram, on the same validation windows."""
    lines = [f"{'':<14}{'nats/byte':>10}{'bits/byte':>11}"]
    for name, loss in (("byte bigram", bigram), ("this model", validation)):
        if loss is not None:
            lines.append(f"{name:<14}{loss:>10.4f}{loss / math.log(2):>11.4f}")
    if validation is not None:
        gain = bigram - validation
        lines.append(f"{'gain':<14}{gain:>10.4f}{gain / math.log(2):>11.4f}")
    return "\n".join(lines)
