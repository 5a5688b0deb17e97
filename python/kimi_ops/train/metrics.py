# SPDX-License-Identifier: MIT
"""Metrics of a run as JSON lines, one object a step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kimi_ops.train.checkpoint import CheckpointError, replace_file


class MetricsError(CheckpointError):
    """A line of metrics cannot be written."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line cut off by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


class MetricsWriter:
    """Appends to a file that holds no line beyond the step a run is resumed at."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._path = path
        # without a buffer: nothing is left that a later close could fail to write
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system, so that a kill loses nothing.

        Raises
        ------
        MetricsError
            The disk is full, say; the file then holds whole lines only.
        """
        end = self._file.tell()
        try:
            rest = memoryview((json.dumps(row) + "\n").encode())
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError as error:
            self._file.truncate(end)
            raise MetricsError(f"train: metrics: cannot write {self._path}: {error}") from error

    def close(self) -> None:
        self._file.close()
