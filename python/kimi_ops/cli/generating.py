# SPDX-License-Identifier: MIT
"""``kimi-ops generate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kimi_ops.cli.options import (
    Device,
    ExpertParallel,
    Timeout,
    fail,
    joined,
    no_room,
    option,
    tell,
)
from kimi_ops.gpu import DeviceError
from kimi_ops.train import CheckpointError, PeerError, RankError
from kimi_ops.train.ranks import TIMEOUT
from kimi_ops.train.sample import MAX_TOKENS, load_model, sample_text
from kimi_ops.train.settings import DTYPES

ERRORS = (ValueError, TypeError, OSError, CheckpointError, DeviceError, PeerError, RankError)


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint or a model folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    max_tokens: Annotated[
        int | None,
        option("Bytes to add at most.", f"{MAX_TOKENS}, or what the model has positions for"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest bytes only.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    expert_parallel: ExpertParallel = 1,
    timeout: Timeout = TIMEOUT,
    dtype: Annotated[
        str | None,
        option(f"Of weights: {' or '.join(DTYPES)}.", "the checkpoint's"),
    ] = None,
) -> None:
    """Continue a text with a trained model."""
    with joined(expert_parallel, timeout, device) as ranks:
        try:
            with ranks.watched():
                say = partial(typer.echo, err=True)
                model = load_model(checkpoint, device=device, dtype=dtype, tell=say, ranks=ranks)
                text = sample_text(
                    model,
                    prompt,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                )
        except ERRORS as error:
            raise fail(error) from None
        except (RuntimeError, MemoryError) as error:
            raise no_room("generate", error) from None
    tell(text)
