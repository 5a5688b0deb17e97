# SPDX-License-Identifier: MIT
"""A report as one page of HTML that needs nothing else: tables, and plots as inline SVG."""

from html import escape
from typing import Any

from benchmarks.drawing import Drawing
from benchmarks.plot import chart, tables_of, where

STYLE = """
body { font: 14px/1.45 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .15rem .6rem;
  border-bottom: 1px solid #ccc; text-align: right } th:first-child, td:first-child {
  text-align: left } .note { color: #666 } svg { max-width: 100%; height: auto }
"""


def page(report: dict[str, Any]) -> str:
    machine, info = where(report), report["info"]
    title = f"kimi_ops {info['version']} on {machine}"
    parts = [f"<h1>{escape(title)}</h1>", _headline(report)]
    if report["busy"]:
        parts.append(
            f"<p><b>Other work ran beside this: load {escape(report['load'])} at the start. "
            "Times and ratios of a quiet machine differ.</b></p>"
        )
    for table in report["tables"]:
        parts += _section(table, machine)
    parts += ["<h2>Libraries</h2>", _table(["library", "here"], report["libraries"].items())]
    roofs = {
        name: f"{rate / 1e9:.1f} GB/s" if name == "bandwidth" else f"{rate / 1e12:.3f} TFLOP/s"
        for name, rate in report["roofs"].items()
    }
    facts = {
        "date": report["date"], "command": report["command"], "commit": report["commit"],
        "python": info["python"], "CUDA kernels": info["cuda"]["built"] or "none in this build",
        "GPU": info["cuda"]["device"], "threads": info["cpu"]["threads"],
        "load at the start": report["load"],
    }  # fmt: skip
    parts += ["<h2>Machine</h2>", _table(["", ""], (facts | roofs).items())]
    parts.append(
        '<p class="note">Medians; all ways of a row take turns in one run, after each result was '
        "compared with ours. Roofs are torch's largest dense product and torch.sum of 512 MB, "
        "in the same run.</p>"
    )
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n" + "\n".join(
        [*parts, "</body></html>\n"]
    )


def _headline(report: dict[str, Any]) -> str:
    """Of every op the geometric mean over its cases against the peer that does best."""
    words = []
    for table in report["tables"]:
        if table["summary"]:
            peer, best = min(table["summary"].items(), key=lambda item: item[1]["geomean"])
            words.append(f"{table['op']} {best['geomean']:.2f}x {peer}")
    return f"<p>Against the fastest other way: {escape(', '.join(words))}.</p>"


def _section(table: dict[str, Any], machine: str) -> list[str]:
    peers = list(dict.fromkeys(name for row in table["rows"] for name in row["ratios"]))
    scale = {"TFLOP/s": 1e12, "GB/s": 1e9}
    rows, notes = [], []
    for row in table["rows"]:
        rate, unit = row["rate"] / scale[row["unit"]], row["unit"]
        ratios = [f"{row['ratios'][p]:.2f}x" if p in row["ratios"] else "-" for p in peers]
        share = f"{100 * row['rate'] / row['roof']:.0f} %"
        rows.append(
            (row["case"], _time(row["time"]["median"]), f"{rate:.3g} {unit}", share, *ratios)
        )
        notes += [f"{row['case']}: without {n}: {why}" for n, why in row["left_out"].items()]
    head = ["case", "kimi_ops", "rate", "of the roof", *(f"against {peer}" for peer in peers)]
    plots = [
        Drawing.stacked([chart(op, drawn, machine)]) for op, drawn in tables_of({"tables": [table]})
    ]
    said = [f'<p class="note">{escape(note)}</p>' for note in dict.fromkeys(notes)]
    title = f"{table['op']} ({table['engine']})" if table["engine"] else table["op"]
    return [f"<h2>{escape(title)}</h2>", _table(head, rows), *plots, *said]


def _table(head: list[str], rows: Any) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    for row in rows:
        lines.append(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
