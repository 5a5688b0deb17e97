# SPDX-License-Identifier: MIT
"""Text as bytes: which files, which of them validate, and which windows a step sees.

Everything follows from the content of the files and the seed. A batch depends on (seed, step) only,
so a run that is resumed at step n sees what it would have seen without the interruption.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

END_OF_FILE = 0  # a byte that does not occur in text; it stands after every file
VOCABULARY = 256
MAX_BYTES = 1 << 30  # the corpus is held in memory
SHARE_BOUNDS = (0.4, 3.0)  # of the validation bytes over those asked for: 2 % to 15 % for 5 %
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class DataError(ValueError):
    """The text to train on cannot be used; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes, uint8, and a fingerprint (SHA-256) of both; `binary` are the
    files that are no text."""

    train: np.ndarray
    validation: np.ndarray
    files: int
    binary: tuple[Path, ...]
    source: str
    fingerprint: str


def standard_library() -> Path:
    """Folder of the running Python's own sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def list_files(source: Path | None) -> list[Path]:
    """The files to read, in the order of their relative POSIX paths.

    Without `source`: the ``*.py`` files of the standard library, without tests and installed
    packages.
    Of any other folder every file that is not hidden. Links to folders are not followed.

    Raises
    ------
    DataError
        The path does not exist, cannot be listed, or holds no file.
    """
    root = standard_library() if source is None else source
    if root.is_file():
        return [root]
    if not root.exists():
        raise DataError(
            f"train: --data: expected a file or a folder, {root} does not exist; check the path"
        )

    def refuse(error: OSError) -> None:
        raise DataError(f"train: --data: cannot list {error.filename}: {error.strerror}")

    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        if source is None:
            folders[:] = [name for name in folders if name not in _SKIPPED]
            names = [name for name in names if name.endswith(".py")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = sorted(
        (file for file in found if file.is_file()),
        key=lambda file: file.relative_to(root).as_posix(),
    )
    if not files:
        raise DataError(
            f"train: --data: expected files to read, {root} holds none; hidden files do not count"
        )
    return files


def is_text(content: bytes) -> bool:
    """Whether a file is UTF-8 without zero bytes, which mark the ends of files."""
    if END_OF_FILE in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def load_corpus(source: Path | None, *, window: int, validation_fraction: float = 0.05) -> Corpus:
    """Read the text and set some of it apart.

    A file validates if its SHA-256, read as a fraction, is below `validation_fraction`: the choice
    needs no seed, and equal files land on the same side. If that leaves a side shorter than a few
    windows, or the validation bytes far from their share (few or very unequal files), the last part
    of every file validates instead.

    Parameters
    ----------
    source : Path or None
        A file, a folder, or None for the standard library.
    window : int
        Bytes of a sequence; both sides hold at least four.
    validation_fraction : float
        Between 0 and 1.

    Raises
    ------
    DataError
        Nothing there, not readable, more than 1 GiB, or too short.
    """
    texts: list[bytes] = []
    binary: list[Path] = []
    total = 0
    for file in list_files(source):
        try:
            total += file.stat().st_size
            if total > MAX_BYTES:
                raise DataError(
                    f"train: --data: expected at most {MAX_BYTES} bytes, {source} has more; "
                    "give a part of it"
                )
            texts.append(file.read_bytes())
            if not is_text(texts[-1]):
                binary.append(file)
        except OSError as error:
            raise DataError(f"train: --data: cannot read {file}: {error.strerror}") from error
    end = bytes([END_OF_FILE])
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for text in texts:
        fraction = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
        sides[fraction < validation_fraction].append(text + end)
    train, validation = b"".join(sides[0]), b"".join(sides[1])
    shortest = 4 * (window + 1)
    share = len(validation) / (len(train) + len(validation)) / validation_fraction
    uneven = not SHARE_BOUNDS[0] <= share <= SHARE_BOUNDS[1]
    if uneven or min(len(train), len(validation)) < shortest:
        cuts = [round(len(text) * (1 - validation_fraction)) for text in texts]
        train = b"".join(t[:c] + end for t, c in zip(texts, cuts, strict=True))
        validation = b"".join(t[c:] + end for t, c in zip(texts, cuts, strict=True))
    if min(len(train), len(validation)) < shortest:
        raise DataError(
            f"train: --data: expected enough text for {shortest} bytes of training and of "
            f"validation (--window {window}), got {len(train)} and {len(validation)}; give more "
            "text or a shorter window"
        )
    digest = hashlib.sha256(len(train).to_bytes(8, "big") + train + validation).hexdigest()
    return Corpus(
        train=np.frombuffer(train, dtype=np.uint8),
        validation=np.frombuffer(validation, dtype=np.uint8),
        files=len(texts),
        binary=tuple(binary),
        source=str(standard_library() if source is None else source.absolute()),
        fingerprint=digest,
    )


def windows(data: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """data[start : start + length] for every start, [B, length] int64."""
    return torch.from_numpy(data[starts[:, None] + np.arange(length)].astype(np.int64))


def training_batch(data: np.ndarray, *, seed: int, step: int, batch: int, window: int) -> Tensor:
    """The `batch` random windows of step `step`, [batch, window + 1] int64."""
    random = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = random.integers(0, len(data) - window, size=batch)
    return windows(data, starts, window + 1)


def validation_set(data: np.ndarray, *, count: int, window: int) -> Tensor:
    """Up to `count` windows spread evenly over the text, without overlap, [n, window + 1] int64."""
    count = min(count, len(data) // (window + 1))
    starts = np.linspace(0, len(data) - window - 1, count).astype(np.int64)
    return windows(data, starts, window + 1)
