# SPDX-License-Identifier: MIT
"""Checkpoints of a run: whole or absent.

    run/step_000100/   config.json, model.safetensors     the model, in the Hugging Face layout
                       optimizer.safetensors              momenta and AdamW moments
                       training.json                      step, settings, sizes and SHA-256 of all
                       files
    run/latest.json    {"checkpoint": "step_000100"}

A checkpoint is written into a hidden folder, made durable and renamed in one step; then
`latest.json` is replaced in one step. Whatever happens in between, `latest.json` names a complete
checkpoint.

Ranks of one run write what one process would: the lead writes, the others send it their layers,
experts and moments. Any number of them reads it, each rank its own part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from kimi_ops.models.kimi_k2 import KimiK2, Stage
from kimi_ops.train.optimizer import RunOptimizer
from kimi_ops.train.ranks import Ranks

_LATEST = "latest.json"
_STATE = "training.json"
_OPTIMIZER = "optimizer.safetensors"
_OTHER = "resume from another step_* folder: give it as --out"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and what is left."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:  # read in pieces: a checkpoint may be larger than memory
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def split_optimizer_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors on the CPU by "<parameter number>.<key>", and the groups as plain values."""
    tensors = {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            tensors[f"{number}.{key}"] = value.cpu().contiguous()
    return tensors, state["param_groups"]


def join_optimizer_state(
    tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """The inverse of :func:`split_optimizer_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".")
        state.setdefault(int(number), {})[key] = tensor
    return {"state": state, "param_groups": groups}


def send_checkpoint(model: KimiK2 | Stage, optimizer: RunOptimizer, ranks: Ranks) -> None:
    """What the other ranks do while the lead is in :func:`save_checkpoint`."""
    if ranks.saves:
        model.save_pretrained(".")  # sends
    optimizer.gather_state_dict()


def save_checkpoint(
    run: Path,
    model: KimiK2 | Stage,
    optimizer: RunOptimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of step ``state["step"]`` and make it the latest; older ones but `keep`
    go. The other ranks call :func:`send_checkpoint`.

    Raises
    ------
    CheckpointError
        The disk is full or not writable. Nothing half-written stays, the previous checkpoint does.
    """
    target = run / f"step_{state['step']:06d}"
    temporary = run / f".{target.name}.tmp"
    try:
        run.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in run.glob(".step_*.tmp"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        temporary.mkdir()
        model.save_pretrained(temporary)
        moments = optimizer.gather_state_dict()
        assert moments is not None  # the lead has them
        tensors, groups = split_optimizer_state(moments)
        save_file(tensors, temporary / _OPTIMIZER)
        _sync(temporary / _OPTIMIZER)
        files = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
        _write(temporary / _STATE, _content({**state, "optimizer_groups": groups, "files": files}))
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)  # left without latest.json naming it
        os.replace(temporary, target)
        _sync(run)
        set_latest(run, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Ctrl-C; another rank, whose end is no fault of the folder
        if isinstance(error, RuntimeError) or not isinstance(error, Exception):
            raise
        previous = _latest_name(run)
        left = f"{run / previous} is intact" if previous else "there is no earlier checkpoint"
        raise CheckpointError(
            f"train: checkpoint: cannot write {target}: {error}; {left}; free space or make the "
            "folder writable, then resume"
        ) from error
    _prune(run, target.name, keep)
    return target


def _latest_name(run: Path) -> str | None:
    try:
        return str(json.loads((run / _LATEST).read_text())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prune(run: Path, newest: str, keep: int) -> None:
    complete = sorted(p for p in run.glob("step_*") if p.is_dir() and p.name <= newest)
    for old in complete[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def set_latest(run: Path, checkpoint: Path) -> None:
    """Make `checkpoint` the one that its run goes on from."""
    replace_file(run / _LATEST, json.dumps({"checkpoint": checkpoint.name}).encode())


def record_settings(checkpoint: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Give a checkpoint the settings that its run goes on with, in one step."""
    replace_file(checkpoint / _STATE, _content({**state, "settings": settings}))


def _content(state: dict[str, Any]) -> bytes:
    return json.dumps(state, indent=1).encode()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint itself, and not the folder of a run."""
    return (path / _STATE).is_file()


def find_checkpoint(path: Path, program: str = "train") -> Path:
    """The checkpoint folder that `path` means: itself, or the latest of a run folder.

    Raises
    ------
    CheckpointError
        Neither is there; the message is that of `program`.
    """
    if is_checkpoint(path):
        return path if path.name not in ("", "..") else path.resolve()
    name = _latest_name(path)
    if name is None:
        found = f"{path}, which does not exist"
        if path.is_dir():
            found = f"{path} without {_LATEST} or {_STATE}"
        elif path.exists():
            found = f"the file {path}"
        mend = "train first, or give the folder that --out named"
        if program == "train":
            mend = "leave --resume out to start a run there, or give the folder of another"
        raise CheckpointError(
            f"{program}: expected the folder of a run or of a checkpoint, got {found}; {mend}"
        )
    if not is_checkpoint(path / name):
        others = sorted(str(other) for other in path.glob("step_*") if is_checkpoint(other))
        mend = f"give {' or '.join(others)} in its place" if others else "train anew elsewhere"
        raise CheckpointError(
            f"{program}: expected the checkpoint that {path / _LATEST} names, got {path / name} "
            f"without {_STATE}; {mend}"
        )
    return path / name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``training.json`` of a checkpoint whose files are all complete.

    Raises
    ------
    CheckpointError
        A file is missing, has another size or another SHA-256 than when it was written.
    """
    try:
        state = json.loads((checkpoint / _STATE).read_text())
        files = dict(state["files"])
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"train: checkpoint: cannot read {checkpoint / _STATE}: {error}; {_OTHER}"
        ) from error
    if step < 0 or _OPTIMIZER not in files:
        raise CheckpointError(
            f"train: checkpoint: expected the state of a training run, got {checkpoint / _STATE}; "
            f"{_OTHER}"
        )
    for name, written in files.items():
        try:
            found = _digest(checkpoint / name)
        except OSError as error:
            raise CheckpointError(
                f"train: checkpoint: cannot read {checkpoint / name}: {error.strerror}; {_OTHER}"
            ) from error
        if found != written:
            raise CheckpointError(
                f"train: checkpoint: {checkpoint / name} is damaged: expected {written['bytes']} "
                f"bytes, got {found['bytes']}"
                + (", other content" if found["bytes"] == written["bytes"] else "")
                + f"; {_OTHER}"
            )
    return state


def load_optimizer(checkpoint: Path, state: dict[str, Any], optimizer: RunOptimizer) -> None:
    """Put the saved moments into `optimizer`, which was built for the same model on any device and
    any number of ranks. It copies what it keeps; the file is mapped, not read."""
    tensors = load_file(checkpoint / _OPTIMIZER)
    optimizer.load_state_dict(join_optimizer_state(tensors, state["optimizer_groups"]))
