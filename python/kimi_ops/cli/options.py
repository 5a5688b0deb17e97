# SPDX-License-Identifier: MIT
"""Options that several programs share, and what they print when something is wrong.

A setting's option is None unless it is given: only what is given overrides a resumed run. Its
default, for --help, is that of :class:`TrainSettings`.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kimi_ops.models.kimi_k2.recompute import RECOMPUTE
from kimi_ops.train import PeerError, Ranks, join_ranks
from kimi_ops.train.layout import SCHEDULES
from kimi_ops.train.settings import DTYPES, FIXED, PRESETS, WINDOW, TrainSettings

NAME = "kimi-ops"


def option(text: str, default: object) -> Any:
    """An option that is None unless given; `default` is what None stands for."""
    return typer.Option(help=f"{text} [default: {default}]")


def setting(name: str, text: str) -> Any:
    return option(text, getattr(TrainSettings(), name))


Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Data = Annotated[
    Path | None,
    option("Text: a file or a folder.", "what a resumed run read, else Python's standard library"),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, or auto: a GPU that works, else the CPU. A run may move.")
]
Bar = Annotated[
    bool,
    typer.Option("--progress/--no-progress", help="A bar on a terminal; else a line now and then."),
]
Preset = Annotated[str | None, setting("preset", f"The model: {' or '.join(PRESETS)}.")]
Dtype = Annotated[
    str | None,
    setting("dtype", f"Of the products: {' or '.join(DTYPES)} (autocast, or --weights)."),
]
Weights = Annotated[
    str | None,
    setting(
        "weights",
        f"{' or '.join(DTYPES)}, which has float32 masters in the optimizer and goes with --dtype "
        "bfloat16.",
    ),
]
Recompute = Annotated[
    str | None,
    setting(
        "recompute",
        f"What backwards compute again to save memory, at the same bits: {', '.join(RECOMPUTE)}.",
    ),
]
Fp8Activations = Annotated[
    bool | None,
    typer.Option(
        "--fp8-activations/--no-fp8-activations",
        help="Keep the inputs of the experts' products and of SwiGLU in FP8 for the backward. "
        "[default: no]",
    ),
]
Steps = Annotated[
    int | None, setting("steps", "Optimizer steps in all; more of them extend a resumed run.")
]
Sequences = Annotated[int | None, setting("sequences", "Sequences of a micro-batch.")]
Window = Annotated[
    int | None,
    option("Bytes of a sequence.", f"{WINDOW}, or the positions of a smaller model"),
]
Accumulate = Annotated[int | None, setting("accumulate", "Micro-batches of a step.")]
Lr = Annotated[float | None, setting("lr", "Peak learning rate.")]
WeightDecay = Annotated[float | None, setting("weight_decay", "Decoupled weight decay.")]
Tau = Annotated[float | None, setting("tau", "Largest attention logit (QK-Clip).")]
Seed = Annotated[int | None, setting("seed", "Of weights and batches.")]
Threads = Annotated[int | None, option("CPU threads.", "0, which is torch's choice")]
ValidateEvery = Annotated[int | None, setting("validate_every", "Steps between validations.")]
CheckpointEvery = Annotated[int | None, setting("checkpoint_every", "Steps between checkpoints.")]
Keep = Annotated[int | None, setting("keep_checkpoints", "The newest checkpoints that stay.")]
ExpertParallel = Annotated[
    int,
    typer.Option(
        help="Of the processes that torchrun starts, how many share the experts of a layer; it "
        "divides their number, or that of a stage. They share each micro-batch."
    ),
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        help="Stages that share the layers; it divides the number of processes. Micro-batches "
        "(--accumulate) pass through them."
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        help=f"Of micro-batches through the stages: {' or '.join(SCHEDULES)}. The same bits."
    ),
]
Overlap = Annotated[
    bool,
    typer.Option(
        "--overlap",
        help="Beside --expert-parallel: compute micro-batches in twos, so that the tokens of one "
        "travel while the other computes; --accumulate is even. The same bits.",
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        help="Seconds until another process that does not come ends the run; a checkpoint must be "
        "written within it."
    ),
]
RESUME_HELP = (
    "Go on from the latest checkpoint in --out. Options given with it change the run, but for "
    f"{', '.join(f'--{name}' for name in FIXED if '_' not in name)} and the product of --sequences "
    "and --accumulate, which would make it another."
)


def fail(error: Exception | str) -> typer.Exit:
    """Say what is wrong, on stderr, unless another process does; raise what this returns."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, PeerError):
        time.sleep(1.0)  # torchrun ends all processes when one ends: let that one say it
    else:
        typer.echo(f"error: {f'rank {rank}: ' * (rank != '0')}{error}", err=True)
    return typer.Exit(1)


def tell(text: str) -> None:
    """Say something, in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


@contextmanager
def joined(expert_parallel: int, timeout: float, device: str, **layout: Any) -> Iterator[Ranks]:
    """The processes of this program; where they cannot come together, what is wrong is said."""
    try:
        with join_ranks(expert_parallel, timeout, device, **layout) as ranks:
            yield ranks
    except (ValueError, PeerError, torch.distributed.DistError) as error:
        raise fail(error) from None


def out_of_memory(error: BaseException) -> bool:
    """Whether the host or a GPU had no room for a tensor."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def no_room(program: str, error: BaseException) -> BaseException:
    """What to raise when the model writes and memory ends; any other error as it is."""
    if not out_of_memory(error):
        return error
    return fail(
        MemoryError(
            f"{program}: expected a model and its cache that fit into memory, got: "
            f"{str(error).splitlines()[0]}; lower --max-tokens, or choose --device cpu or --dtype "
            "bfloat16"
        )
    )


def command_line(*arguments: object, **options: Any) -> str:
    """A command to type, for as many processes as this run has: options that are None or False are
    left out."""
    words = [NAME]
    world, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world > 1:
        hosts = ["--nnodes", str(world // here)] if world > here else []
        words = ["torchrun", *hosts, "--nproc-per-node", str(here), "-m", "kimi_ops"]
    words += map(str, arguments)
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)
