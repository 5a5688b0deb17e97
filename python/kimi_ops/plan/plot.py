# SPDX-License-Identifier: MIT
"""A plan as a picture: the times of a layer and the memory of a rank, by size of EP groups."""

import logging
from pathlib import Path
from typing import Any

from kimi_ops.plan.estimate import Estimate
from kimi_ops.plan.planner import Plan

__all__ = ["plot_plan"]

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")


def _bars(axes: Any, found: list[Estimate], stacks: list[dict[str, float]]) -> None:
    """A bar for each estimate, stacked by the names in `stacks`."""
    names = [name for name in stacks[-1] if any(stack[name] for stack in stacks)]
    bottom = [0.0] * len(found)
    for name, colour in zip(names, _COLOURS, strict=False):
        heights = [stack[name] for stack in stacks]
        axes.bar(range(len(found)), heights, bottom=bottom, color=colour, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(found)), [str(e.layout.ep) for e in found])
    axes.set_xlabel("ranks that share the experts (EP)")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def plot_plan(plan: Plan, out: Path) -> Path:
    """Draw `plan` into `out`, in the format of its suffix (png, svg, pdf)."""
    # its notes on font caches and temporary folders are not the user's concern
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = plan.by_ep
    figure, (times, sizes) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _bars(times, found, [{p.name: 1e3 * p.seconds for p in e.layer} for e in found])
    times.set_ylabel("ms a micro-batch" if plan.work.training else "ms a step")
    times.set_title("A layer with experts")
    _bars(sizes, found, [{n: b / 1e9 for n, b in e.memory.parts.items()} for e in found])
    sizes.axhline(plan.hardware.memory / 1e9, color="#666666", linestyle="--")
    sizes.set_ylim(0, 2 * plan.hardware.memory / 1e9)
    sizes.set_ylabel("GB (dashed: what a GPU has)")
    sizes.set_title("The fullest rank")
    figure.suptitle(
        f"Model's prediction: {plan.work.mode}, {plan.gpus} x {plan.hardware.name}, best layout of "
        "each size",
        fontsize=10,
    )
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return out
