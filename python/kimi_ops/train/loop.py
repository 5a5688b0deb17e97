# SPDX-License-Identifier: MIT
"""A whole training run: data, steps, validation, metrics, checkpoints, resuming, stopping."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kimi_ops.gpu import choose_device
from kimi_ops.info import engines_line
from kimi_ops.train.bigram import bigram_loss
from kimi_ops.train.checkpoint import (
    CheckpointError,
    find_checkpoint,
    is_checkpoint,
    read_state,
    record_settings,
    save_checkpoint,
    set_latest,
)
from kimi_ops.train.data import Corpus, load_corpus, training_batch, validation_set
from kimi_ops.train.metrics import MetricsError, MetricsWriter
from kimi_ops.train.progress import Progress
from kimi_ops.train.resume import resumed_settings, resumed_trainer, saved_source
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer

LOCK = ".lock"  # of the folder of a run: whoever trains there holds it


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


@contextmanager
def _open_run(
    out: Path,
    step: int,
    checkpoint: Path | None,
    state: dict[str, Any],
    latest: bytes | None,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> Iterator[MetricsWriter]:
    """The folder of a run, ready for the step after `step`, for this process alone; nothing is
    written unless it is still as it was when `checkpoint`, `state` and `latest` were read."""
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, descriptor)
            _lock(out, descriptor, say)
            _still(out, checkpoint, state, latest)
            if checkpoint is not None:
                if settings != state["settings"]:
                    record_settings(checkpoint, state, settings)
                set_latest(out, checkpoint)
            metrics = stack.enter_context(closing(MetricsWriter(out / "metrics.jsonl", step)))
        except OSError as error:
            raise CheckpointError(
                f"train: --out: expected a folder to write in, got {out}: {error}; free space or "
                "name another (no checkpoint was changed)"
            ) from error
        yield metrics


def _latest(out: Path) -> bytes | None:
    """What ``latest.json`` holds."""
    path = out / "latest.json"
    return path.read_bytes() if path.exists() else None


def _still(out: Path, checkpoint: Path | None, state: dict[str, Any], latest: bytes | None) -> None:
    """Another process may have trained in the folder while this one read it."""
    same = _latest(out) == latest
    if checkpoint is not None:
        same = same and is_checkpoint(checkpoint) and read_state(checkpoint) == state
    if not same:
        raise CheckpointError(
            f"train: --out: another process has written to {out} meanwhile; start again, with "
            "--resume"
        )


def _lock(out: Path, descriptor: int, say: Callable[[str], None]) -> None:
    """Keep other processes out until `descriptor` is closed, by a kill too."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"train: --out: another process is training in {out}; wait until it ends, or name "
            "another folder"
        ) from error
    except OSError as error:
        say(f"note   {out} cannot be locked ({error}): let no other process train there")


def train(
    out: Path,
    *,
    data: Path | None = None,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
    device: str = "cpu",
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
        Go on from the latest checkpoint in `out`, on a CPU bit for bit as if never interrupted
        (same machine and thread count).
    overrides : dict, optional
        Fields of :class:`TrainSettings` that differ from the defaults, or from those of a resumed
        run; what that may not change is refused.
    device : str
        ``cpu``, ``cuda``, or ``auto``: a GPU that works, else the CPU. No part of the settings: a
        run may move. Weights and batches are drawn on the CPU, the same for every device.
    say : callable
        Receives lines of text for the user.
    progress : bool
        Show a progress bar where stderr is a terminal; else lines go to `say`.

    Raises
    ------
    DataError, CheckpointError, DeviceError, ValueError, Diverged
        With a message for the user; what was saved before stays.
    """
    overrides = overrides or {}
    checkpoint, state = None, {}
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"train: --out: expected a folder, got the file {out}; name another")
    latest = _latest(out.resolve().parent if is_checkpoint(out) else out)
    if resume:
        checkpoint = find_checkpoint(out)
        state = read_state(checkpoint)
        settings = resumed_settings(state, overrides, say)
        out = checkpoint.parent  # `out` may have named the checkpoint itself
        data = saved_source(state) if data is None else data
        done = "; that is all of it, larger --steps extend it" * (state["step"] == settings.steps)
        say(f"resumed {out} after step {state['step']} of {settings.steps}{done}")
    elif latest is not None or is_checkpoint(out):
        raise CheckpointError(
            f"train: --out: {out} already holds a run; pass --resume, or another folder"
        )
    else:
        settings = TrainSettings(**overrides)
    place = choose_device(device, "train", say)
    if settings.threads:  # a resumed run takes the threads it had: their number decides about bits
        torch.set_num_threads(settings.threads)
    settings = dataclasses.replace(settings, threads=torch.get_num_threads())
    corpus = load_corpus(data, window=settings.window)
    step, seconds, validation = 0, 0.0, None
    if checkpoint is not None:
        trainer = resumed_trainer(checkpoint, state, settings, corpus, place)
        step, seconds, validation = state["step"], state["seconds"], state["validation_loss"]
    else:
        trainer = Trainer(settings, device=place)
    sequences = validation_set(
        corpus.validation, count=settings.validation_sequences, window=settings.window
    )
    baseline = bigram_loss(corpus.train, sequences)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    _introduce(corpus, settings, parameters, place, say)
    say(f"bigram {baseline:.4f} nats a byte on the validation windows")

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
            "device": str(place),
            "data": {
                "source": corpus.source,
                "default": data is None,
                "fingerprint": corpus.fingerprint,
            },
        }
        return save_checkpoint(
            out, trainer.model, trainer.optimizer, state, settings.keep_checkpoints
        )

    progress_shown = Progress(step, settings.steps, say, bar=progress)
    with (
        _open_run(out, step, checkpoint, state, latest, settings.to_dict(), say) as metrics,
        closing(progress_shown),
        stop_on_signal() as stopped,
    ):
        while step < settings.steps and not stopped():
            begin = time.monotonic()
            batch = training_batch(
                corpus.train,
                seed=settings.seed,
                step=step,
                batch=settings.windows_per_step,
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
            progress_shown.show(row, validation)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                save()
        if saved != step:
            save()
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


def _introduce(
    corpus: Corpus,
    settings: TrainSettings,
    parameters: int,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """What is trained on what, by which kernels."""
    say(engines_line(device.type))
    say(
        f"text   {corpus.source}: {corpus.files} files, {len(corpus.train):,} bytes to train, "
        f"{len(corpus.validation):,} to validate"
    )
    if corpus.binary:
        say(
            f"note   {len(corpus.binary)} of {corpus.files} files are no UTF-8 text, the first is "
            f"{corpus.binary[0]}: their bytes are trained on as they are"
        )
    threads = f"{settings.threads} threads"
    where = threads if device.type == "cpu" else torch.cuda.get_device_name(device)
    say(
        f"model  {settings.preset}, {parameters:,} parameters; {settings.dtype} on {device.type}, "
        f"{where}"
    )


def _kept(save: Callable[[], Path]) -> str:
    """Save after a failure, and say what that left."""
    try:
        return f"{save()} was saved; free space and resume"
    except CheckpointError as error:
        return str(error)
