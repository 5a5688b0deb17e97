# SPDX-License-Identifier: MIT
"""``kimi-ops train`` and ``kimi-ops demo``."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_ops._program import INTERRUPTED
from kimi_ops.cli import options as opt
from kimi_ops.gpu import DeviceError
from kimi_ops.train import (
    CheckpointError,
    Diverged,
    PeerError,
    RankError,
    Ranks,
    TrainResult,
    TrainSettings,
)
from kimi_ops.train import train as train_run
from kimi_ops.train.checkpoint import find_checkpoint, read_state
from kimi_ops.train.layout import SCHEDULES
from kimi_ops.train.plot import plot_run, require_matplotlib
from kimi_ops.train.ranks import TIMEOUT
from kimi_ops.train.resume import saved_source
from kimi_ops.train.sample import load_model, sample_text

KEEP = "keep_checkpoints"  # the setting of --keep
ERRORS = (
    ValueError,
    CheckpointError,
    DeviceError,
    FloatingPointError,
    OSError,
    ImportError,
    PeerError,
    RankError,
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
    expert_parallel: int
    timeout: float
    overlap: bool = False
    pipeline_parallel: int = 1
    schedule: str = SCHEDULES[0]


def train(
    context: typer.Context,
    out: opt.Out = Path("runs/mini"),
    data: opt.Data = None,
    resume: Annotated[bool, typer.Option("--resume", help=opt.RESUME_HELP)] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the metrics at the end.")] = False,
    preset: opt.Preset = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    weights: opt.Weights = None,
    recompute: opt.Recompute = None,
    fp8_activations: opt.Fp8Activations = None,
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
    expert_parallel: opt.ExpertParallel = 1,
    pipeline_parallel: opt.PipelineParallel = 1,
    schedule: opt.Schedule = SCHEDULES[0],
    overlap: opt.Overlap = False,
    timeout: opt.Timeout = TIMEOUT,
) -> None:
    """Train a small Kimi K2 on text, byte by byte. Ctrl-C saves; --resume goes on bit for bit.
    Under torchrun, by many processes."""
    request = Request(
        out, data, resume, device, _overrides(context), plot, progress, expert_parallel, timeout,
        overlap, pipeline_parallel, schedule,
    )  # fmt: skip
    ways = {"overlap": overlap, "pipeline_parallel": pipeline_parallel, "schedule": schedule}
    with opt.joined(expert_parallel, timeout, device, **ways) as ranks:
        _train(request, ranks)


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
    expert_parallel: opt.ExpertParallel = 1,
    timeout: opt.Timeout = TIMEOUT,
) -> None:
    """Train the mini model for a few minutes, plot the run, let the model write. Resumes if
    stopped."""
    overrides = _overrides(context)
    try:
        state = read_state(find_checkpoint(out)) if (out / "latest.json").exists() else None
    except CheckpointError as error:
        raise opt.fail(error) from None
    if state is not None and state["step"] == (steps or state["settings"]["steps"]):
        opt.tell(f"{out} holds a finished run; showing it again (remove the folder to train anew)")
    resume = state is not None
    request = Request(
        out, data, resume, device, overrides, True, progress, expert_parallel, timeout
    )
    with opt.joined(expert_parallel, timeout, device) as ranks:
        _train(request, ranks)
        try:
            with ranks.watched():
                model = load_model(out, device=device, ranks=ranks)
                text = sample_text(
                    model,
                    "import os\n\n\ndef ",
                    max_tokens=None,
                    temperature=0.7,
                    top_p=0.95,
                    seed=0,
                )
        except (*ERRORS, TypeError) as error:
            raise opt.fail(error) from None
        except (RuntimeError, MemoryError) as error:
            raise opt.no_room("demo", error) from None
    opt.tell(f"\na sample, temperature 0.7:\n\n{text}")
    again = opt.command_line("generate", out, prompt="class ", temperature=0.5, **_ranks(request))
    opt.tell(f"\nmore: {again}")


def _overrides(context: typer.Context) -> dict[str, Any]:
    """The settings that were given on the command line."""
    given = {**context.params, KEEP: context.params.get("keep")}
    names = TrainSettings.__dataclass_fields__
    return {name: given[name] for name in names if given.get(name) is not None}


def _train(request: Request, ranks: Ranks) -> None:
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
            ranks=ranks,
        )
    except Diverged as error:
        if not ranks.lead:
            raise opt.fail(PeerError("rank 0 says it")) from None
        raise opt.fail(f"{error}; {_slower(request, error)}") from None
    except ERRORS as error:
        raise opt.fail(error) from None
    except (RuntimeError, MemoryError) as error:
        if not opt.out_of_memory(error):
            raise
        raise opt.fail(
            f"train: expected a step that fits into memory, got: {str(error).splitlines()[0]}; "
            "halve --sequences and double --accumulate, which sees the same text (a resumed run "
            "may), or choose --recompute selective or --dtype bfloat16"
        ) from None
    except KeyboardInterrupt:  # the second one: the first lets the run end by itself
        run = _saved_run(request.out)
        left = (
            "there is no checkpoint yet"
            if run is None
            else f"go on with: {_again(run, **_place(request))}"
        )
        if ranks.lead:
            typer.echo(f"broken off without saving; {left}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    try:
        if ranks.lead:
            _report(request, result)
        with ranks.watched():
            ranks.told(None)  # torchrun ends all when one ends: the lead has had its say
    except ERRORS as error:
        raise opt.fail(error) from None
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def _report(request: Request, result: TrainResult) -> None:
    """How a run ended."""
    typer.echo(f"checkpoint {result.checkpoint}\nmetrics    {result.metrics}")
    if request.plot:
        tau = read_state(result.checkpoint)["settings"]["tau"]
        out, bigram = result.metrics.parent, result.bigram_loss
        for path in plot_run(result.metrics, out, bigram=bigram, tau=tau):
            typer.echo(f"plot       {path}")
    if result.finished:
        typer.echo(_table(result.validation_loss, result.bigram_loss))
        return
    again = _again(result.metrics.parent, **_place(request))
    typer.echo(f"stopped after step {result.step}; go on with: {again}")


def _saved_run(out: Path) -> Path | None:
    """The folder of the run that `out` means, if it can be resumed."""
    try:
        return find_checkpoint(out).parent
    except CheckpointError:
        return None


def _again(run: Path, **more: Any) -> str:
    """The command that resumes a run; it needs no other option but the device that was chosen."""
    return opt.command_line("train", out=run, resume=True, **more)


def _place(request: Request) -> dict[str, Any]:
    """--device, where the user chose one, and how processes share the run."""
    device = {} if request.device == "auto" else {"device": request.device}
    return device | _ranks(request)


def _ranks(request: Request) -> dict[str, Any]:
    """The options of several processes, where they are not the defaults."""
    chosen = {
        "expert_parallel": (request.expert_parallel, 1),
        "pipeline_parallel": (request.pipeline_parallel, 1),
        "schedule": (request.schedule, SCHEDULES[0]),
        "overlap": (request.overlap, False),
        "timeout": (request.timeout, TIMEOUT),
    }
    return {name: value for name, (value, default) in chosen.items() if value != default}


def _slower(request: Request, diverged: Diverged) -> str:
    """What to do about a diverged run, in the state that it left."""
    lr, run = diverged.lr / 2, _saved_run(request.out)
    if run is None:
        again = _start(request, request.out, request.data, request.overrides, lr)
        return f"there is no checkpoint yet; start again with: {again}"
    checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    where = _place(request)
    if diverged.step > state["step"] + 1:
        return f"go on from {checkpoint.name} with: {_again(run, lr=lr, **where)}"
    # the weights of that checkpoint are beyond repair
    older = [path for path in sorted(run.glob("step_*")) if path.name < checkpoint.name]
    if older:
        return f"go on from the older {older[-1].name} with: {_again(older[-1], lr=lr, **where)}"
    defaults, options = TrainSettings().to_dict(), {*inspect.signature(train).parameters, KEEP}
    saved = {k: v for k, v in state["settings"].items() if k in options and v != defaults[k]}
    beside = run.with_name(f"{run.name}-slower")
    again = _start(request, beside, saved_source(state), saved, lr)
    return f"there is no older checkpoint; start again with: {again}"


def _start(
    request: Request, out: Path, data: Path | None, settings: dict[str, Any], lr: float
) -> str:
    """The command that starts a run with `settings` and another learning rate."""
    same = {"keep" if name == KEEP else name: value for name, value in settings.items()}
    options = {**same, "plot": request.plot, "device": request.device, "lr": lr, **_ranks(request)}
    return opt.command_line("train", out=out, data=data, **options)


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
