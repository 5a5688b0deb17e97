# SPDX-License-Identifier: MIT
"""The ratios of all tables of a run as bars, one chart a table."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.report import Table
from kimi_ops.facts import info

matplotlib.use("Agg")


def plot(tables: Sequence[Table], path: Path) -> None:
    from matplotlib import pyplot

    filled = [table for table in tables if table.rows and table.names]
    heights = [0.64 * len(table.rows) + 1.5 for table in filled]
    figure, columns = pyplot.subplots(
        len(filled), figsize=(9, sum(heights)), height_ratios=heights, squeeze=False
    )
    cpu, cuda = info()["cpu"], info()["cuda"]
    for axes, table in zip(columns[:, 0], filled, strict=True):
        for i, name in enumerate(table.names):
            places = [row + 0.8 * i / len(table.names) for row in range(len(table.rows))]
            values = [row.ratios().get(name, 0.0) for row in table.rows]
            axes.barh(places, values, height=0.8 / len(table.names), label=f"against {name}")
        axes.set_yticks(range(len(table.rows)), [row.case for row in table.rows], fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("times faster (ratio of medians)")
        where = f"{cpu['processor']}, {cpu['threads']} threads, {cpu['isa']}"
        where = where if table.device == "cpu" else cuda["device"]
        axes.set_title(f"{table.op}: {where}", fontsize=9)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
