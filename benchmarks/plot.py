# SPDX-License-Identifier: MIT
"""The ratios of measured tables as bars, one chart a table; without matplotlib, to the byte.

``python -m benchmarks.plot`` draws docs/plots anew from the reports in benchmarks/results.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.drawing import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, YELLOW, Drawing

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = ROOT / "benchmarks/results", ROOT / "docs/plots"
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY)
WIDE, RIGHT, BAR = 400, 90, 11

Report = dict[str, Any]  # as a Session writes it, or one of the older forms in benchmarks/results


def tables_of(report: Report) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Names of tables, and their rows that have ratios."""
    for table in report.get("tables") or [report]:
        rows = [row for row in table.get("rows", []) if row.get("ratios")]
        if rows:
            yield table["op"], rows


def where(report: Report) -> str:
    """Hardware, versions and date."""
    info, machine = report.get("info") or {}, report["machine"]
    if isinstance(machine, dict):  # of the first H100
        parts = [machine["gpu"], f"torch {machine['torch']}", f"driver {machine['driver']}"]
    elif report["device"] == "cuda":
        parts = [info["cuda"]["device"], f"torch {info['torch']}"]
    else:
        cpu = info["cpu"]
        name = f"{cpu['processor']}, {cpu['threads']} threads, {cpu['isa']}"
        parts = [name, f"torch {info['torch']}"]
    return ", ".join([*parts, report["date"]])


def chart(op: str, rows: Sequence[dict[str, Any]], machine: str) -> Drawing:
    """Bars of how often ours fits into a peer's time, from 1 to the right where ours is faster, on
    a logarithmic scale."""
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    ratios = [ratio for row in rows for ratio in row["ratios"].values()]
    low, high = min(0.5, *ratios), max(2.0, *ratios)
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    step = max(1, (last - first) // 8)
    lines = sum(len(row["ratios"]) * BAR + 7 for row in rows)
    top, left = 66, 16 + 6 * max(len(row["case"]) for row in rows)
    drawing = Drawing(left + WIDE + RIGHT, top + lines + 38, f"{op}: {machine}")

    def place(ratio: float) -> float:
        return left + WIDE * (math.log2(ratio) - first) / (last - first)

    drawing.text(10, 20, op, size=14)
    drawing.text(10, 38, machine, fill=GREY, size=11)
    for i, peer in enumerate(peers):
        x = 10 + (left + WIDE + RIGHT - 20) / len(peers) * i
        drawing.box(x, 46, 10, 10, COLORS[i % len(COLORS)])
        drawing.text(x + 14, 55, f"against {peer}", size=11)
    for power in range(first, last + 1):
        x = place(2.0**power)
        drawing.line(x, top, x, top + lines, INK if power == 0 else PALE)
        if (power - first) % step == 0 or power == 0:
            drawing.text(x, top + lines + 14, f"{2.0**power:g}x", anchor="middle", size=10)
    drawing.text(left, top + lines + 30, "times as fast (ratio of medians)", fill=GREY, size=10)
    y = float(top + 4)
    for row in rows:
        middle = y + len(row["ratios"]) * BAR / 2 + 4
        drawing.text(left - 6, middle, row["case"], anchor="end", size=10)
        for name, ratio in row["ratios"].items():
            begin, end = sorted((place(1.0), place(ratio)))
            color = COLORS[peers.index(name) % len(COLORS)]
            drawing.box(begin, y, max(end - begin, 0.5), BAR - 2, color)
            drawing.text(end + 3, y + 8.5, f"{ratio:.2f}", size=9)
            y += BAR
        y += 7
    return drawing


def charts(report: Report) -> list[Drawing]:
    return [chart(op, rows, where(report)) for op, rows in tables_of(report)]


def plot(report: Report, path: Path) -> None:
    """All charts of a report below each other in one SVG."""
    path.write_text(Drawing.stacked(charts(report)))


def drawn() -> dict[str, str]:
    """The files of docs/plots."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    found = {name: charts(report) for name, report in reports.items()}
    return {f"{name}.svg": Drawing.stacked(parts) for name, parts in found.items() if parts}


if __name__ == "__main__":
    PLOTS.mkdir(exist_ok=True)
    for name, text in drawn().items():
        (PLOTS / name).write_text(text)
