# SPDX-License-Identifier: MIT
"""The command ``kimi-ops``: info, train, generate, demo, bench."""

from __future__ import annotations

import importlib.util
import math
import runpy
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Kernels of a Kimi-K2-class mixture-of-experts model, and the model itself in miniature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130  # exit status of a program that Ctrl-C ended


def engines_line() -> str:
    """Which engine serves which ops on the CPU, on one line."""
    from kimi_ops.info import info

    served: dict[str, list[str]] = {}
    for op, engine in info()["engines"].items():
        served.setdefault(engine["cpu"], []).append(op)
    return "engines " + "; ".join(f"{name}: {', '.join(ops)}" for name, ops in served.items())


def _fail(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Option(help="Also count a model's parameters: k2, mini or tiny.")
    ] = None,
) -> None:
    """Versions, instruction sets, devices, the engine of each op; a model's parameters and
    memory."""
    from kimi_ops.info import describe
    from kimi_ops.models.kimi_k2 import KimiK2Config
    from kimi_ops.models.kimi_k2.parameters import parameter_report

    if model not in (None, "k2", "mini", "tiny"):
        raise _fail(
            ValueError(f"info: --model: expected k2, mini or tiny, got {model}; choose one")
        )
    typer.echo(describe())
    if model is not None:
        typer.echo(f"\nmodel {model}\n{parameter_report(getattr(KimiK2Config, model)())}")


Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Text: a file or a folder. Default: what a resumed run read, else Python's standard "
        "library."
    ),
]


@app.command()
def train(
    out: Out = Path("runs/mini"),
    data: Data = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint in --out.")
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the metrics at the end.")] = False,
    preset: Annotated[str | None, typer.Option(help="mini or tiny.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Sequences of a micro-batch.")] = None,
    window: Annotated[int | None, typer.Option(help="Bytes of a sequence.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled weight decay.")] = None,
    tau: Annotated[float | None, typer.Option(help="Largest attention logit (QK-Clip).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and batches.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0: torch's choice.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a small Kimi K2 on text, byte by byte. Ctrl-C saves; --resume goes on bit for bit."""
    chosen = {
        "preset": preset,
        "steps": steps,
        "sequences": sequences,
        "window": window,
        "accumulate": accumulate,
        "lr": lr,
        "weight_decay": weight_decay,
        "tau": tau,
        "seed": seed,
        "threads": threads,
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
    }
    overrides = {name: value for name, value in chosen.items() if value is not None}
    _train(out, data, resume, overrides, plot=plot, progress=progress)


def _train(
    out: Path,
    data: Path | None,
    resume: bool,
    overrides: dict[str, Any],
    *,
    plot: bool,
    progress: bool,
) -> None:
    """Run, then say how it ended."""
    from kimi_ops.train import CheckpointError
    from kimi_ops.train import train as run
    from kimi_ops.train.checkpoint import find_checkpoint
    from kimi_ops.train.plot import require_matplotlib

    typer.echo(engines_line())
    try:
        if plot:
            require_matplotlib()
        result = run(
            out, data=data, resume=resume, overrides=overrides, say=typer.echo, progress=progress
        )
    except (
        ValueError,
        CheckpointError,
        FloatingPointError,
        OSError,
        ImportError,
    ) as error:
        raise _fail(error) from None
    except KeyboardInterrupt:  # the second one: the first lets the run end by itself
        try:
            left = f"go on with: {_again(find_checkpoint(out).parent)}"
        except CheckpointError:
            left = "there is no checkpoint yet"
        typer.echo(f"broken off without saving; {left}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"checkpoint {result.checkpoint}\nmetrics    {result.metrics}")
    if plot:
        try:
            paths = _plots(result.checkpoint, result.metrics, result.bigram_loss)
        except (ValueError, CheckpointError, OSError, ImportError) as error:
            raise _fail(error) from None
        for path in paths:
            typer.echo(f"plot       {path}")
    if not result.finished:
        again = _again(result.metrics.parent)
        typer.echo(f"stopped after step {result.step}; go on with: {again}")
        raise typer.Exit(INTERRUPTED)
    typer.echo(_table(result.validation_loss, result.bigram_loss))


def _again(run: Path) -> str:
    """The command that resumes a run; it needs no other option."""
    return f"kimi-ops train --out {shlex.quote(str(run))} --resume"


def _plots(checkpoint: Path, metrics: Path, bigram: float) -> list[Path]:
    from kimi_ops.train.checkpoint import read_state
    from kimi_ops.train.plot import plot_run

    tau = read_state(checkpoint)["settings"]["tau"]
    return plot_run(metrics, metrics.parent, bigram=bigram, tau=tau)


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


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint or a model folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    max_tokens: Annotated[int, typer.Option(help="Bytes to add at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest bytes only.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a text with a trained model."""
    from kimi_ops.train import CheckpointError
    from kimi_ops.train.sample import load_model, sample_text

    try:
        text = sample_text(
            load_model(checkpoint),
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    except (ValueError, TypeError, OSError, CheckpointError) as error:
        raise _fail(error) from None
    typer.echo(text)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    data: Data = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    preset: Annotated[str | None, typer.Option(help="mini or tiny.")] = None,
    window: Annotated[int | None, typer.Option(help="Bytes of a sequence.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train the mini model for a few minutes, plot the run, let the model write. Resumes if
    stopped."""
    from kimi_ops.train import CheckpointError
    from kimi_ops.train.checkpoint import find_checkpoint, read_state
    from kimi_ops.train.sample import load_model, sample_text

    chosen = {"steps": steps, "preset": preset, "window": window}
    overrides = {name: value for name, value in chosen.items() if value is not None}
    try:
        state = read_state(find_checkpoint(out)) if (out / "latest.json").exists() else None
    except CheckpointError as error:
        raise _fail(error) from None
    if state is not None and state["step"] >= state["settings"]["steps"]:
        typer.echo(
            f"{out} holds a finished run; showing it again (remove the folder to train anew)"
        )
    _train(out, data, state is not None, overrides, plot=True, progress=progress)
    try:
        model = load_model(out)
        text = sample_text(
            model,
            "import os\n\n\ndef ",
            max_tokens=min(400, model.config.max_position_embeddings - 32),
            temperature=0.7,
            top_p=0.95,
            seed=0,
        )
    except (ValueError, TypeError, OSError, CheckpointError) as error:
        raise _fail(error) from None
    typer.echo(f"\na sample, temperature 0.7:\n\n{text}")
    typer.echo(f"\nmore: kimi-ops generate {out} --prompt 'class ' --temperature 0.5")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout: kimi-ops bench [arguments of python -m
    benchmarks]."""
    sys.path.insert(0, str(Path.cwd()))
    if importlib.util.find_spec("benchmarks") is None or not Path("benchmarks").is_dir():
        raise _fail(
            FileNotFoundError(
                f"bench: expected the folder benchmarks of a source checkout in {Path.cwd()}; "
                f"run it there"
            )
        )
    sys.argv = ["benchmarks", *context.args]
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)


def main() -> None:
    """Entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
