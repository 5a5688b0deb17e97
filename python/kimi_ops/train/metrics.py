# SPDX-License-Identifier: MIT
"""Metrics of a run as JSON lines, one object a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from kimi_ops.train.checkpoint import replace_file


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
        self._file: TextIO = open(path, "a")  # noqa: SIM115 (closed by close)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system, so that a kill loses nothing."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
