# SPDX-License-Identifier: MIT
"""``kimi-ops chat``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kimi_ops.cli.generating import ERRORS
from kimi_ops.cli.options import Device, fail, no_room, option
from kimi_ops.gpu import choose_device
from kimi_ops.train.checkpoint import find_checkpoint
from kimi_ops.train.settings import DTYPES

if TYPE_CHECKING:
    from kimi_ops.models.kimi_k2.chat import Event


def chat(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint or a model folder.")],
    system: Annotated[
        str | None, option("What the model is told first.", "that it is Kimi, as K2's template has")
    ] = None,
    tools: Annotated[
        Path | None, option("JSON: a list of declarations, as OpenAI's.", "none")
    ] = None,
    max_tokens: Annotated[
        int | None, option("Tokens of an answer at most.", "what the model has positions for")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens only.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str | None, option(f"Of weights: {' or '.join(DTYPES)}.", "the checkpoint's")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the tokenizer's code in the folder.")
    ] = False,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave out the vision tower of a model that sees.")
    ] = False,
) -> None:
    """Talk with a model, a line at a time; you are the tools that it calls."""
    import torch

    from kimi_ops.models.kimi_k2 import KimiK2
    from kimi_ops.models.kimi_k2.chat import load_tokenizer, reply

    say = partial(typer.echo, err=True)
    try:
        if dtype not in (None, *DTYPES):
            raise ValueError(f"chat: --dtype: expected {' or '.join(DTYPES)}, got {dtype}; choose")
        folder = checkpoint
        if not (checkpoint / "config.json").is_file():
            folder = find_checkpoint(checkpoint, "chat")
        declared = None if tools is None else _declared(tools)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        say(f"tokenizer: {tokenizer.source}")
        model = KimiK2.from_pretrained(
            folder,
            device=choose_device(device, "chat", say),
            dtype=None if dtype is None else getattr(torch, dtype),
            text_only=text_only,
        ).eval()
        source = torch.Generator(device=model.lm_head.weight.device).manual_seed(seed)
        messages: list[dict[str, Any]] = []
        if system is not None:
            messages.append({"role": "system", "content": system})
        while True:
            messages += _lines(messages[-1].get("tool_calls", []) if messages else [])
            turn = reply(
                model,
                tokenizer,
                messages,
                declared,
                max_new_tokens=max_tokens,
                tell=_show,
                temperature=temperature,
                top_p=top_p,
                generator=source,
            )
            typer.echo()
            messages.append(turn.message)
    except EOFError:
        typer.echo()
    except ERRORS as error:
        raise fail(error) from None
    except (RuntimeError, MemoryError) as error:
        raise no_room("chat", error) from None


def _lines(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the person says: the results of the calls, or something of their own."""
    if not calls:
        return [{"role": "user", "content": _line("> ")}]
    return [
        {
            "role": "tool",
            "name": call["function"]["name"],
            "tool_call_id": call["id"],
            "content": _line(f"{call['id']}> "),
        }
        for call in calls
    ]


def _line(prompt: str) -> str:
    typer.echo(prompt, nl=False, err=True)
    return input()


def _declared(path: Path) -> list[dict[str, Any]]:
    from kimi_ops.models.kimi_k2.chat.tool_schema import functions_of

    try:
        declared = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"chat: --tools: expected JSON, got {path} ({error}); mend it") from None
    if not isinstance(declared, list):
        raise ValueError(
            f"chat: --tools: expected a list of tools, got a {type(declared).__name__} in {path}; "
            "put it into brackets"
        )
    functions_of(declared)
    return declared


def _show(event: Event) -> None:
    if isinstance(event, str):
        typer.echo(event, nl=False)
        return
    typer.echo(f"\n[call {event.name or event.id or '?'} {event.text}]")
    for complaint in (event.malformed, *event.complaints):
        if complaint:
            typer.echo(f"[{complaint}]")
