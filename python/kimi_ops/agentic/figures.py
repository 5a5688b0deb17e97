# SPDX-License-Identifier: MIT
"""A run as pictures: what synthesis kept, what each stage learnt, how reinforcement went, what the
critic is worth, and where the held-out tools lie."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_ops.agentic.evaluate import SPLITS
from kimi_ops.agentic.specs import Tool, is_held_out, repository
from kimi_ops.agentic.synthesis import read_attempts
from kimi_ops.agentic.tasks import FAMILIES
from kimi_ops.train.metrics import read_metrics

__all__ = ["draw", "funnel", "plane"]

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
GRAMS = 512  # most frequent ones, of three letters
CURVES = {  # of the metrics of reinforcement: what is drawn in one picture
    "reward and success": ("reward", "success"),
    "malformed calls, share": ("malformed",),
    "bytes over budget, mean share": ("budget",),
    "entropy, nats an id": ("entropy",),
    "squared step s^2": ("squared",),
    "largest attention logit": ("largest",),
}

Rows = list[dict[str, Any]]


def funnel(lines: Rows) -> dict[str, Counter[str]]:
    """By family how many attempts were kept, or why not.

    Examples
    --------
    >>> from kimi_ops.agentic.figures import funnel
    >>> lines = [("ask", []), ("ask", ["end state", "calls"]), ("none", ["crowded"])]
    >>> funnel([{"family": family, "reasons": reasons} for family, reasons in lines])
    {'ask': Counter({'kept': 1, 'end state': 1}), 'none': Counter({'crowded': 1})}
    """
    found: dict[str, Counter[str]] = {}
    for line in lines:
        reason = line["reasons"][0] if line["reasons"] else "kept"
        found.setdefault(line["family"], Counter())[reason] += 1
    return found


def plane(tools: Sequence[Tool]) -> np.ndarray:
    """Tools by the letters of their names and fields, on the two axes along which they differ most.

    Returns
    -------
    array [tools, 2]
        Counts of groups of three letters, centred, on their first two principal components.
    """
    texts = [f" {tool.name} {' '.join(tool.parameters['properties'])} " for tool in tools]
    grams = [Counter(text[i : i + 3] for i in range(len(text) - 2)) for text in texts]
    often = Counter(gram for counted in grams for gram in counted).most_common(GRAMS)
    counts = np.array([[counted[gram] for gram, _ in often] for counted in grams], dtype=float)
    counts -= counts.mean(0)
    _, axes = np.linalg.eigh(counts.T @ counts)  # the largest come last
    return counts @ axes[:, :-3:-1]


def _funnel(axes: Any, run: Path) -> None:
    counted = funnel(read_attempts(run / "attempts.jsonl"))
    families = [family for family in FAMILIES if family in counted]
    reasons = Counter(name for family in families for name in counted[family].elements())
    names = ["kept", *(name for name, _ in reasons.most_common() if name != "kept")]
    bars = {name: np.array([counted[family][name] for family in families]) for name in names}
    if len(bars) > len(COLOURS):
        bars["others"] = np.sum([bars.pop(name) for name in names[len(COLOURS) - 1 :]], axis=0)
    left = np.zeros(len(families))
    for (name, widths), colour in zip(bars.items(), COLOURS, strict=False):
        axes[0].barh(families, widths, left=left, color=colour, label=name)
        left += widths
    axes[0].invert_yaxis()
    axes[0].set_xlabel("attempts")
    axes[0].set_title(f"{reasons['kept']} of {sum(reasons.values())} attempts kept, and why not")


def _success(axes: Any, run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    width = 0.8 / len(found)
    for place, split in enumerate(SPLITS):
        for number, (stage, measured) in enumerate(found.items()):
            shares = measured["greedy"][split]["success"]
            where = np.arange(len(shares)) + (number - len(found) / 2 + 0.5) * width
            heights = [100 * share for share in shares.values()]
            axes[place].bar(where, heights, width, color=COLOURS[number], label=stage)
        axes[place].set_xticks(range(len(shares)), list(shares), rotation=45)
        axes[place].set_ylim(0, 100)
        axes[place].set_title(split)
    axes[0].set_ylabel("success, greedy, % (tell: mean worth)")


def _curves(axes: Any, run: Path) -> None:
    rows = read_metrics(run / "rl.jsonl")
    for place, (title, names) in enumerate(CURVES.items()):
        for name, colour in zip(names, COLOURS, strict=False):
            known = [(row["step"], row[name]) for row in rows if row[name] is not None]
            if known:
                axes[place].plot(*zip(*known, strict=True), color=colour, label=name)
        axes[place].set_title(title)
        axes[place].set_xlabel("step")


def _critic(axes: Any, run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    heights = [measured["sampled"]["words"]["success"]["tell"] for measured in found.values()]
    axes[0].bar(list(found), heights, color=COLOURS[: len(found)])
    axes[0].set_ylim(0, 1)
    axes[0].set_ylabel('true worth of "tell", held-out words, T = 1')
    axes[0].set_title("What training never saw")
    for number, (name, file) in enumerate(_reinforced(run)):
        rows = [row for row in read_metrics(file) if row["agreement"] is not None]
        shares = [100 * row["agreement"] for row in rows]
        steps = [row["step"] for row in rows]
        axes[1].plot(steps, shares, "o-", color=COLOURS[number + 1], label=name, markersize=3)
    axes[1].axhline(50, color="#666666", linestyle="--")
    axes[1].set_ylim(0, 100)
    axes[1].set_ylabel("critic's accuracy on verifiable pairs, %")
    axes[1].set_xlabel("step of reinforcement")


def _reinforced(run: Path) -> Iterator[tuple[str, Path]]:
    """The metrics of each arm."""
    for file in sorted(run.glob("rl*.jsonl")):
        yield file.stem, file


def _tools(axes: Any, run: Path) -> None:
    tools = repository()
    places, held = plane(tools), np.array([is_held_out(tool) for tool in tools])
    for name, which, colour in (("trained", ~held, COLOURS[5]), ("held out", held, COLOURS[1])):
        label = f"{which.sum()} {name}"
        axes[0].scatter(*places[which].T, s=6, color=colour, label=label, rasterized=True)
    axes[0].set_xticks([])
    axes[0].set_yticks([])
    axes[0].set_title("Tools by the letters of their names and fields")


# name: what it is drawn from, rows and columns, how
_FIGURES: dict[str, tuple[str, tuple[int, int], Callable[[Any, Path], None]]] = {
    "funnel": ("attempts.jsonl", (1, 1), _funnel),
    "success": ("results.json", (1, 3), _success),
    "rl": ("rl.jsonl", (2, 3), _curves),
    "critic": ("rl.jsonl", (1, 2), _critic),
    "tools": ("attempts.jsonl", (1, 1), _tools),
}


def draw(run: Path, out: Path | None = None) -> list[Path]:
    """Draw all that a run's folder has the numbers of, as SVG.

    Parameters
    ----------
    run : Path
        With ``attempts.jsonl``, ``results.json`` or ``rl.jsonl``, of a run that has come so far.
    out : Path, optional
        Where ``funnel.svg``, ``tools.svg``, ``success.svg``, ``rl.svg`` and ``critic.svg`` go; the
        run's folder where absent.

    Returns
    -------
    list of Path

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "agentic: figures: expected matplotlib, which is not there; pip install matplotlib, "
            "then run the command again: what was measured is kept"
        )
    # its notes on font caches and temporary folders are not the user's concern
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    with matplotlib.rc_context({"svg.hashsalt": "kimi_ops", "svg.fonttype": "none"}):
        for name, (source, (rows, columns), drawn) in _FIGURES.items():
            if not (run / source).exists():
                continue
            size = (max(7, 3.6 * columns), 4.2 if rows == 1 else 2.8 * rows)
            figure, axes = plt.subplots(
                rows, columns, figsize=size, layout="constrained", squeeze=False
            )
            drawn(axes.flat, run)
            for one in axes.flat:
                one.grid(alpha=0.3)
                if one.get_legend_handles_labels()[0]:
                    one.legend(frameon=False, fontsize=8)
            paths.append((run if out is None else out) / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            plt.close(figure)
    return paths
