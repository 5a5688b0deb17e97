# SPDX-License-Identifier: MIT
"""A whole training run: data, steps, validation, metrics, checkpoints, resuming, stopping."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.train.bigram import bigram_loss
from kimi_ops.train.checkpoint import (
    CheckpointError,
    find_checkpoint,
    is_checkpoint,
    load_optimizer,
    read_state,
    save_checkpoint,
    set_latest,
)
from kimi_ops.train.data import (
    Corpus,
    load_corpus,
    standard_library,
    training_batch,
    validation_set,
)
from kimi_ops.train.metrics import MetricsError, MetricsWriter
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are nats a byte on the same validation windows."""

    step: int
    finished: bool
    validation_loss: float | None
    bigram_loss: float
    checkpoint: Path
    metrics: Path
    parameters: int
    seconds: float


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the run to stop after its step; a second Ctrl-C breaks it
    off."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python handles signals only there
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _saved_settings(state: dict[str, Any], requested: dict[str, Any]) -> TrainSettings:
    """The settings a run was started with, which `requested` may repeat but not change."""
    try:
        saved = TrainSettings(**state["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"train: checkpoint: its settings are not of this version: {error}"
        ) from error
    for name, value in requested.items():
        if name == "threads" and value == 0:
            continue  # no number asked for: the run keeps its own
        if getattr(saved, name) != value:
            raise ValueError(
                f"train: {name}: the run was started with {getattr(saved, name)}, got {value}; "
                f"leave it out, "
                "or start another run with another --out"
            )
    return saved


def _resume(
    checkpoint: Path, state: dict[str, Any], settings: TrainSettings, corpus: Corpus
) -> Trainer:
    """The trainer as the checkpoint left it."""
    if state["data"]["fingerprint"] != corpus.fingerprint:
        raise CheckpointError(
            f"train: --data: the run read {state['data']['source']}, whose content differs from "
            f"that of "
            f"{corpus.source}; resume with the same text"
        )
    trainer = Trainer(settings, KimiK2.from_pretrained(checkpoint))
    load_optimizer(checkpoint, state, trainer.optimizer)
    return trainer


def _open_run(out: Path, step: int, checkpoint: Path | None) -> MetricsWriter:
    """Make the folder of a run ready for the step after `step`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            set_latest(out, checkpoint)
        return MetricsWriter(out / "metrics.jsonl", step)
    except OSError as error:
        raise CheckpointError(
            f"train: --out: expected a folder to write in, got {out}: {error}; free space or name "
            "another (no checkpoint was changed)"
        ) from error


def _saved_source(state: dict[str, Any]) -> Path | None:
    """The text that a run read, as `data` of :func:`train`."""
    source = Path(state["data"]["source"])
    default = state["data"].get("default", source == standard_library())
    return None if default else source


def train(
    out: Path,
    *,
    data: Path | None = None,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> TrainResult:
    """Train on text until the settings' last step, or until Ctrl-C.

    Parameters
    ----------
    out : Path
        Folder of the run: checkpoints, ``latest.json``, ``metrics.jsonl``. To resume, one of its
        checkpoints may be given instead, which then becomes the latest.
    data : Path, optional
        A file or a folder. Absent: what a resumed run read, else the standard library's sources.
    resume : bool
        Go on from the latest checkpoint in `out`, bit for bit as if never interrupted (same machine
        and thread count).
    overrides : dict, optional
        Fields of :class:`TrainSettings` that differ from the defaults.
    say : callable
        Receives lines of text for the user.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    DataError, CheckpointError, ValueError, FloatingPointError
        With a message for the user; what was saved before stays.
    """
    overrides = overrides or {}
    checkpoint = None
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"train: --out: expected a folder, got the file {out}; name another")
    if resume:
        checkpoint = find_checkpoint(out)
        state = read_state(checkpoint)
        settings = _saved_settings(state, overrides)
        out = checkpoint.parent  # `out` may have named the checkpoint itself
        data = _saved_source(state) if data is None else data
    elif (out / "latest.json").exists() or is_checkpoint(out):
        raise CheckpointError(
            f"train: --out: {out} already holds a run; pass --resume, or another folder"
        )
    else:
        settings = TrainSettings(**overrides)
    if settings.threads:  # a resumed run takes the threads it had: their number decides about bits
        torch.set_num_threads(settings.threads)
    settings = dataclasses.replace(settings, threads=torch.get_num_threads())
    corpus = load_corpus(data, window=settings.window)
    step, seconds, validation = 0, 0.0, None
    if checkpoint is not None:
        trainer = _resume(checkpoint, state, settings, corpus)
        step, seconds, validation = state["step"], state["seconds"], state["validation_loss"]
        say(f"resumed {out} after step {step} of {settings.steps}")
    else:
        trainer = Trainer(settings)
    sequences = validation_set(
        corpus.validation, count=settings.validation_sequences, window=settings.window
    )
    baseline = bigram_loss(corpus.train, sequences)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(
        f"text   {corpus.source}: {corpus.files} files, {len(corpus.train):,} bytes to train, "
        f"{len(corpus.validation):,} to validate"
    )
    say(f"model  {settings.preset}, {parameters:,} parameters; {settings.threads} threads")
    say(f"bigram {baseline:.4f} nats a byte on the validation windows")

    metrics = _open_run(out, step, checkpoint)
    started = time.monotonic() - seconds
    saved: int | None = step if resume else None

    def save() -> Path:
        nonlocal saved
        saved = step
        state = {
            "step": step,
            "seconds": time.monotonic() - started,
            "settings": settings.to_dict(),
            "bigram_loss": baseline,
            "validation_loss": validation,
            "torch": torch.__version__,
            "data": {
                "source": corpus.source,
                "default": data is None,
                "fingerprint": corpus.fingerprint,
            },
        }
        return save_checkpoint(
            out, trainer.model, trainer.optimizer, state, settings.keep_checkpoints
        )

    bar = tqdm(
        total=settings.steps,
        initial=step,
        disable=not progress,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
    )
    try:
        with stop_on_signal() as stopped, bar:
            while step < settings.steps and not stopped():
                begin = time.monotonic()
                batch = training_batch(
                    corpus.train,
                    seed=settings.seed,
                    step=step,
                    batch=settings.sequences * settings.accumulate,
                    window=settings.window,
                )
                statistics = trainer.step(batch, step)
                step += 1
                rate = settings.tokens_per_step / (time.monotonic() - begin)
                row = {"step": step, **dataclasses.asdict(statistics), "tokens_per_second": rate}
                if step % settings.validate_every == 0 or step == settings.steps:
                    validation = row["validation_loss"] = trainer.validate(sequences)
                row["seconds"] = time.monotonic() - started
                try:
                    metrics.write(row)
                except MetricsError as error:  # the step was made: keep it if there is still room
                    raise MetricsError(f"{error}; {_kept(save)}") from error
                bar.set_postfix_str(_describe(row, validation), refresh=False)
                bar.update()
                if step % settings.checkpoint_every == 0 or step == settings.steps:
                    save()
            if saved != step:
                save()
    finally:
        metrics.close()
    return TrainResult(
        step=step,
        finished=step >= settings.steps,
        validation_loss=validation,
        bigram_loss=baseline,
        checkpoint=find_checkpoint(out),
        metrics=out / "metrics.jsonl",
        parameters=parameters,
        seconds=time.monotonic() - started,
    )


def _kept(save: Callable[[], Path]) -> str:
    """Save after a failure, and say what that left."""
    try:
        return f"{save()} was saved; free space and resume"
    except CheckpointError as error:
        return str(error)


def _describe(row: dict[str, Any], validation: float | None) -> str:
    """The right end of the progress bar."""
    parts = [f"loss {row['loss']:.3f}"]
    if validation is not None:
        parts.append(f"val {validation:.3f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    parts.append(f"max logit {row['max_logit']:.1f}")
    parts.append(f"load {row['load_max_over_mean']:.2f}")
    return ", ".join(parts)
