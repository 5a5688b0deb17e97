# SPDX-License-Identifier: MIT
"""A whole training run: data, steps, validation, metrics, checkpoints, resuming, stopping."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kimi_ops.facts import engines_line
from kimi_ops.gpu import choose_device
from kimi_ops.models.kimi_k2.parameters import parameter_report
from kimi_ops.train.bigram import bigram_loss
from kimi_ops.train.checkpoint import (
    CheckpointError,
    find_checkpoint,
    save_checkpoint,
    send_checkpoint,
)
from kimi_ops.train.data import Corpus, load_corpus, training_batch, validation_set
from kimi_ops.train.folder import Plan, open_run, planned
from kimi_ops.train.metrics import MetricsError
from kimi_ops.train.progress import Progress
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.resume import check_text, resumed_trainer
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer, check_run


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
def stop_on_signal(*, breaks: bool = True) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the run to stop after its step; a second Ctrl-C breaks it
    off, if `breaks`."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python handles signals only there
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if breaks and asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    out: Path,
    *,
    data: Path | None = None,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
    progress: bool = True,
    ranks: Ranks | None = None,
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
        (same machine, thread count and ranks).
    overrides : dict, optional
        Fields of :class:`TrainSettings` that differ from the defaults, or from those of a resumed
        run; what that may not change is refused.
    device : str
        ``cpu``, ``cuda``, or ``auto``: a GPU that works, else the CPU. No part of the settings: a
        run may move. Weights and batches are drawn on the CPU, the same for every device.
    say : callable
        Receives lines of text for the user, on the first rank.
    progress : bool
        Show a progress bar where stderr is a terminal; else lines go to `say`.
    ranks : Ranks, optional
        The processes that share the run, from :func:`join_ranks`: all of them call this with the
        same arguments. No part of the settings either.

    Raises
    ------
    DataError, CheckpointError, DeviceError, ValueError, Diverged
        With a message for the user; what was saved before stays.
    PeerError, RankError
        Another rank has raised an error; has ended or does not come.
    """
    ranks = Ranks() if ranks is None else ranks
    with ranks.watched():
        plan = planned(out, data, resume, overrides or {}, say, ranks)
        return _train(plan, device, say if ranks.lead else _quiet, progress and ranks.lead, ranks)


def _quiet(line: str) -> None:
    """What ranks but the first say."""


def _train(
    plan: Plan, device: str, say: Callable[[str], None], progress: bool, ranks: Ranks
) -> TrainResult:
    settings, state = plan.settings, plan.state
    with ranks.together():
        check_run(settings, ranks)
        place = choose_device(device, "train", say)
        if settings.threads:  # a resumed run takes the threads it had: they decide about bits
            torch.set_num_threads(settings.threads)
        settings = dataclasses.replace(settings, threads=torch.get_num_threads())
        corpus = load_corpus(plan.data, window=settings.window)
        if state:
            check_text(state, corpus)
    ranks.agree("--data", corpus.fingerprint)
    step, seconds, validation = plan.step, 0.0, None
    if plan.checkpoint is not None:
        trainer = resumed_trainer(plan.checkpoint, state, settings, place, ranks)
        seconds, validation = state["seconds"], state["validation_loss"]
    else:
        trainer = Trainer(settings, device=place, ranks=ranks)
    sequences = validation_set(
        corpus.validation, count=settings.validation_sequences, window=settings.window
    )
    baseline = bigram_loss(corpus.train, sequences)
    parameters = parameter_report(settings.model_config()).parameters
    _introduce(corpus, settings, parameters, place, say)
    if ranks.world > 1:
        say(ranks.describe())
    say(f"bigram {baseline:.4f} nats a byte on the validation windows")

    started = time.monotonic() - seconds
    saved: int | None = step if state else None
    broken: MetricsError | None = None

    def save() -> None:
        nonlocal saved
        saved = step
        if not ranks.lead:
            send_checkpoint(trainer.model, trainer.optimizer, ranks)
            return
        facts = {
            "step": step,
            "seconds": time.monotonic() - started,
            "settings": settings.to_dict(),
            "bigram_loss": baseline,
            "validation_loss": validation,
            "torch": torch.__version__,
            "device": str(place),
            "processes": ranks.world,
            "data": {
                "source": corpus.source,
                "default": plan.data is None,
                "fingerprint": corpus.fingerprint,
            },
        }
        keep = settings.keep_checkpoints
        save_checkpoint(plan.out, trainer.model, trainer.optimizer, facts, keep)

    def save_once() -> None:
        if saved != step:
            save()

    with ExitStack() as stack:
        with ranks.together():
            metrics = None
            if ranks.lead:
                metrics = stack.enter_context(open_run(plan, settings.to_dict(), say))
        shown = stack.enter_context(closing(Progress(step, settings.steps, say, bar=progress)))
        # torchrun passes a Ctrl-C on to processes that have had it from the terminal already
        stopped = stack.enter_context(stop_on_signal(breaks=ranks.world == 1))
        while step < settings.steps and not ranks.any(stopped() or broken is not None):
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
                if metrics is not None:
                    metrics.write(row)
            except MetricsError as error:  # the step was made: keep it if there is still room
                broken = error
            else:
                shown.show(row, validation)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                save()
        kept = ""
        if broken is None:
            save_once()
        else:
            kept = _kept(save_once, plan.out)
        with ranks.together():  # the others have written nothing, and would wait for this one
            if broken is not None:
                raise MetricsError(f"{broken}; {kept}") from broken
    return TrainResult(
        step=step,
        finished=step >= settings.steps,
        validation_loss=validation,
        bigram_loss=baseline,
        checkpoint=ranks.told(find_checkpoint(plan.out) if ranks.lead else plan.out)[0],
        metrics=plan.out / "metrics.jsonl",
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


def _kept(save: Callable[[], None], out: Path) -> str:
    """Save after a failure, and say what that left."""
    try:
        save()
    except CheckpointError as error:
        return str(error)
    return f"{find_checkpoint(out)} was saved; free space and resume"
