# SPDX-License-Identifier: MIT
"""The folder of a run: what it holds when a run begins, and that one process writes there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_ops.train.checkpoint import (
    CheckpointError,
    find_checkpoint,
    is_checkpoint,
    read_state,
    record_settings,
    set_latest,
)
from kimi_ops.train.metrics import MetricsWriter
from kimi_ops.train.ranks import Ranks
from kimi_ops.train.resume import resumed_settings, saved_source
from kimi_ops.train.settings import TrainSettings

LOCK = ".lock"  # of the folder of a run: whoever trains there holds it


@dataclass(frozen=True)
class Plan:
    """What is to be done, as the first rank found the folder of the run."""

    out: Path
    data: Path | None
    settings: TrainSettings
    checkpoint: Path | None
    state: dict[str, Any]
    latest: bytes | None

    @property
    def step(self) -> int:
        return int(self.state["step"]) if self.state else 0


def planned(
    out: Path,
    data: Path | None,
    resume: bool,
    overrides: dict[str, Any],
    say: Callable[[str], None],
    ranks: Ranks,
) -> Plan:
    """What the folder of a run and the options ask for: the first rank reads, for all."""
    ranks.agree("options", (str(out), str(data), resume, overrides))
    plan = None
    with ranks.together():
        if ranks.lead:
            plan = _read(out, data, resume, overrides, say, ranks.world)
    plan = ranks.told(plan)[0]
    assert plan is not None
    return plan


def _read(
    out: Path,
    data: Path | None,
    resume: bool,
    overrides: dict[str, Any],
    say: Callable[[str], None],
    processes: int,
) -> Plan:
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"train: --out: expected a folder, got the file {out}; name another")
    latest = _latest(out.resolve().parent if is_checkpoint(out) else out)
    if resume:
        checkpoint = find_checkpoint(out)
        state = read_state(checkpoint)
        settings = resumed_settings(state, overrides, say, processes)
        out = checkpoint.parent  # `out` may have named the checkpoint itself
        data = saved_source(state) if data is None else data
        done = "; that is all of it, larger --steps extend it" * (state["step"] == settings.steps)
        say(f"resumed {out} after step {state['step']} of {settings.steps}{done}")
        return Plan(out, data, settings, checkpoint, state, latest)
    if latest is not None or is_checkpoint(out):
        raise CheckpointError(
            f"train: --out: {out} already holds a run; pass --resume, or another folder"
        )
    return Plan(out, data, TrainSettings(**overrides), None, {}, latest)


@contextmanager
def open_run(
    plan: Plan, settings: dict[str, Any], say: Callable[[str], None]
) -> Iterator[MetricsWriter]:
    """The folder of a run, ready for its next step, for this process alone; nothing is written
    unless it is still as it was when the plan was made."""
    out, checkpoint, state = plan.out, plan.checkpoint, plan.state
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, descriptor)
            _lock(out, descriptor, say)
            _still(plan)
            if checkpoint is not None:
                if settings != state["settings"]:
                    record_settings(checkpoint, state, settings)
                set_latest(out, checkpoint)
            metrics = stack.enter_context(closing(MetricsWriter(out / "metrics.jsonl", plan.step)))
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


def _still(plan: Plan) -> None:
    """Another process may have trained in the folder while this one read it."""
    same, out = _latest(plan.out) == plan.latest, plan.out
    if plan.checkpoint is not None:
        same = same and is_checkpoint(plan.checkpoint)
        same = same and read_state(plan.checkpoint) == plan.state
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
