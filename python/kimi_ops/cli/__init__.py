# SPDX-License-Identifier: MIT
"""The command ``kimi-ops``: info, plan, train, generate, chat, demo,
agentic, bench."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

import kimi_ops
from kimi_ops import _program
from kimi_ops.cli.agentic import agentic
from kimi_ops.cli.bench import bench
from kimi_ops.cli.chatting import chat
from kimi_ops.cli.generating import generate
from kimi_ops.cli.options import NAME, fail
from kimi_ops.cli.plan import plan
from kimi_ops.cli.training import demo, train
from kimi_ops.models.kimi_k2.config import presets

app = typer.Typer(
    name=NAME,
    help="Kernels of a Kimi-K2-class mixture-of-experts model, and the model itself in miniature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help and errors as plain lines
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MODELS = " or ".join([", ".join(presets.NAMES[:-1]), presets.NAMES[-1]])
_COUNTS = (
    "parameters", "total", "active", "bf16_bytes", "fp8_bytes", "kv_cache_bytes_per_token",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {kimi_ops.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Kernels of a Kimi-K2-class mixture-of-experts model, and the model itself in miniature."""


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option(help=f"Also count a model's parameters: {_MODELS}. [default: none]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Versions, instruction sets, devices, the engine of each op; a model's parameters and
    memory."""
    from kimi_ops.facts import describe, info
    from kimi_ops.models.kimi_k2 import KimiK2Config
    from kimi_ops.models.kimi_k2.parameters import parameter_report

    if model is not None and model not in presets.NAMES:
        raise fail(ValueError(f"info: --model: expected {_MODELS}, got {model}; choose one"))
    report = None if model is None else parameter_report(getattr(KimiK2Config, model)())
    if as_json:
        numbers = {} if report is None else {name: getattr(report, name) for name in _COUNTS}
        counted = {"model": {"name": model, **numbers}} if numbers else {}
        typer.echo(json.dumps({**info(), **counted}, indent=2))
        return
    typer.echo(describe())
    if report is not None:
        typer.echo(f"\nmodel {model}\n{report}")


app.command()(plan)
app.command()(train)
app.command()(generate)
app.command()(chat)
app.command()(demo)
app.command()(agentic)
app.command(
    add_help_option=False,  # --help is the benchmarks'
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench)


def main() -> None:
    """Entry point of the installed command."""
    _program.ready()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows "?"
        if stream is not None:  # closed by the caller
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app(prog_name=NAME)
