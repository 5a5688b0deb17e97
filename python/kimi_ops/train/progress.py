# SPDX-License-Identifier: MIT
"""What a run shows while it goes on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_EVERY = 10  # steps


class Progress:
    """Shows step after step.

    Parameters
    ----------
    step, steps : int
        Made so far, and in all.
    say : callable
        Receives the lines.
    bar : bool
        A bar on stderr where that is a terminal. Else a line at the first step, every ten steps, at
        each validation and at the end: a log keeps what it shows.
    """

    def __init__(self, step: int, steps: int, say: Callable[[str], None], *, bar: bool) -> None:
        self._steps, self._say, self._first = steps, say, step + 1
        self._bar = None
        if bar and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5
            )

    def show(self, row: dict[str, Any], validation: float | None) -> None:
        """Show a line of metrics; `validation` is the latest loss."""
        if self._bar is not None:
            self._bar.set_postfix_str(describe(row, validation), refresh=False)
            self._bar.update()
            return
        step = row["step"]
        regular = step % LINE_EVERY == 0 or step in (self._first, self._steps)
        if regular or "validation_loss" in row:
            self._say(f"step {step}/{self._steps}: {describe(row, row.get('validation_loss'))}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def describe(row: dict[str, Any], validation: float | None) -> str:
    """The numbers of a step that matter while it runs."""
    parts = [f"loss {row['loss']:.3f}"]
    if validation is not None:
        parts.append(f"val {validation:.3f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    parts.append(f"max logit {row['max_logit']:.1f}")
    parts.append(f"load {row['load_max_over_mean']:.2f}")
    return ", ".join(parts)
