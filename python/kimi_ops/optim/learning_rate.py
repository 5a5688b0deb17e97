# SPDX-License-Identifier: MIT
"""How a learning rate becomes the factor of an orthogonal update."""

from __future__ import annotations

import math
from collections.abc import Callable

AdjustLr = str | Callable[[float, tuple[int, int]], float] | None


def adjusted_lr(lr: float, adjust: AdjustLr, shape: tuple[int, int]) -> float:
    """The factor of an orthogonal update of a [rows, columns] matrix.

    ``original``: sqrt(max(1, rows / columns)); ``match_rms_adamw``: 0.2 sqrt(max(rows, columns)),
    which gives the update a root mean square of 0.2, that of AdamW, since an orthogonal matrix has
    1 / sqrt(max(rows, columns)).
    """
    rows, columns = shape
    if callable(adjust):
        rate = adjust(lr, shape)
        if not math.isfinite(rate):
            raise ValueError(
                f"MuonClip: adjust_lr_fn: expected a finite factor for lr {lr} and shape {shape}, "
                f"got {rate}; mend the function"
            )
        return rate
    if adjust == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(rows, columns))
    return lr * math.sqrt(max(1.0, rows / max(columns, 1)))
