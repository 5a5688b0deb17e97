# SPDX-License-Identifier: MIT
"""Plots of a run, from its metrics: loss, expert balance, largest attention logit."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_ops.train.metrics import read_metrics

# Okabe and Ito's colours, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"
_LAYERS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Rows = list[dict[str, Any]]


def _smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential average without bias towards the start."""
    average, norm, out = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + 1 - weight
        out.append(average / norm)
    return out


def _loss(axes: Any, rows: Rows, bigram: float, tau: float) -> None:
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    axes.plot(steps, losses, color=_BLUE, alpha=0.4, linewidth=0.8)
    axes.plot(steps, _smoothed(losses), color=_BLUE, label="training (smoothed)")
    judged = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    if judged:
        axes.plot(*zip(*judged, strict=True), "o-", color=_ORANGE, label="validation")
    axes.axhline(bigram, color=_GREY, linestyle="--", label=f"byte bigram, {bigram:.3f}")
    axes.set_ylabel("cross entropy [nats per byte]")
    axes.set_title("Loss")


def _balance(axes: Any, rows: Rows, bigram: float, tau: float) -> None:
    steps = [r["step"] for r in rows]
    for layer in range(len(rows[0]["load_layers"])):
        axes.plot(
            steps,
            _smoothed([r["load_layers"][layer] for r in rows]),
            color=_LAYERS[layer % len(_LAYERS)],
            label=f"MoE layer {layer + 1}",
        )
    axes.axhline(1.0, color=_GREY, linestyle="--", label="perfect balance")
    axes.set_ylabel("busiest expert's tokens / mean [1]")
    axes.set_title("Expert balance (smoothed)")


def _max_logit(axes: Any, rows: Rows, bigram: float, tau: float) -> None:
    axes.plot(
        [r["step"] for r in rows], [r["max_logit"] for r in rows], color=_BLUE, label="all heads"
    )
    if max(r["max_logit"] for r in rows) > 0.3 * tau:
        axes.axhline(tau, color=_GREY, linestyle="--", label=f"tau = {tau:g}")
    axes.set_ylabel("largest attention logit [1]")
    axes.set_title(f"Largest attention logit (QK-Clip acts above tau = {tau:g})")


_PLOTS: dict[str, Callable[[Any, Rows, float, float], None]] = {
    "loss": _loss,
    "expert_balance": _balance,
    "max_logit": _max_logit,
}


def require_matplotlib() -> None:
    """Raise an ImportError that says how to mend it; called before a long run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "plot: expected matplotlib, which is not installed; pip install matplotlib, or train "
            "without --plot"
        )


def plot_run(metrics: Path, out: Path, *, bigram: float, tau: float) -> list[Path]:
    """Draw a run's metrics as PNG files.

    Parameters
    ----------
    metrics : Path
        ``metrics.jsonl``.
    out : Path
        Folder for ``loss.png``, ``expert_balance.png`` and ``max_logit.png``.
    bigram : float
        Baseline for the loss, nats a byte.
    tau : float
        Threshold of QK-Clip.

    Returns
    -------
    list of Path

    Raises
    ------
    ValueError
        No metrics yet.
    ImportError
        matplotlib is not installed.
    """
    rows = read_metrics(metrics)
    if not rows:
        raise ValueError(f"plot: metrics: expected lines in {metrics}, found none; train first")
    require_matplotlib()
    # its notes on font caches and temporary folders are not the user's concern
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for name, draw in _PLOTS.items():
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        draw(axes, rows, bigram, tau)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths
