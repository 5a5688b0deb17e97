# SPDX-License-Identifier: MIT
"""Warm-up, stable, decay: the learning-rate schedule of Kimi K2."""

from __future__ import annotations


def warmup_stable_decay(
    step: int, total: int, *, warmup: int, decay: int, floor: float = 0.0
) -> float:
    """Factor of the peak learning rate for step `step`, counted from 0.

    Linear from 1 / warmup to 1 over the first `warmup` steps, then 1, then linear to `floor` over
    the last `decay` steps; the stable part can be prolonged afterwards without a trace, which is
    why the schedule is used.

    Raises
    ------
    ValueError
        Warm-up and decay together are longer than the run, or a number out of range.

    Examples
    --------
    >>> [warmup_stable_decay(s, 6, warmup=2, decay=2) for s in range(6)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    if warmup < 0 or decay < 0 or warmup + decay > total:
        raise ValueError(
            f"warmup_stable_decay: warmup, decay: expected two numbers >= 0 within {total} steps, "
            f"got {warmup} and {decay}; make the run longer"
        )
    if not 0 <= floor <= 1:
        raise ValueError(
            f"warmup_stable_decay: floor: expected 0 to 1, got {floor}; it is a share of the peak"
        )
    if step < warmup:
        return (step + 1) / warmup
    remaining = total - step
    return floor + (1 - floor) * min(1.0, remaining / decay) if decay else 1.0
