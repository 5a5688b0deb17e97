# SPDX-License-Identifier: MIT
"""The table of a benchmark: header with hardware and versions, rows, JSON and a plot."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import Time
from kimi_ops.info import describe, info


@dataclass
class Row:
    case: str
    time: Time
    work: float  # FLOP or bytes of one call
    unit: str  # "TFLOP/s" or "GB/s"
    roof: float  # of the same unit, in FLOP/s or bytes/s
    peers: dict[str, Time] = field(default_factory=dict)
    peak_bytes: int = 0
    peer_bytes: int = 0

    def rate(self) -> float:
        return self.work / self.time.median

    def ratios(self) -> dict[str, float]:
        return {name: peer.median / self.time.median for name, peer in self.peers.items()}


class Report:
    """Prints rows as they come and keeps them for JSON and plots.

    `peers` names the columns of ratios where not every row has them all, `reference` one of them
    that does other work and stays out of the summary; `width` is that of the cases' names.
    """

    def __init__(
        self,
        op: str,
        device: str,
        arguments: Any,
        *,
        width: int = 34,
        peers: Sequence[str] = (),
        reference: str | None = None,
    ) -> None:
        self.op, self.device, self.arguments = op, device, arguments
        self.width, self.names, self.reference = width, list(peers), reference
        self.rows: list[Row] = []
        print(f"# {op} on {device}\n{describe()}\ncommand   {self._command()}\n", flush=True)

    @staticmethod
    def _command() -> str:
        name = sys.modules["__main__"].__spec__
        return " ".join(["python -m", name.name if name else sys.argv[0], *sys.argv[1:]])

    def add(self, row: Row) -> None:
        if not self.rows:
            self.names = self.names or list(row.peers)
            peers = "".join(f"{'x ' + name:>16}" for name in self.names)
            print(
                f"{'case':<{self.width}}{'median':>10}{'p10':>10}{'p90':>10}{row.unit:>10}"
                f"{'% roof':>8}{peers}{'peak':>10}{'torch':>10}"
            )
        self.rows.append(row)
        scale, digits = (1e12, 3) if row.unit == "TFLOP/s" else (1e9, 2)
        found, share = row.ratios(), 100 * row.rate() / row.roof
        ratios = "".join(f"{found[n]:>16.2f}" if n in found else f"{'-':>16}" for n in self.names)
        print(
            f"{row.case:<{self.width}}{_us(row.time.median):>10}{_us(row.time.p10):>10}"
            f"{_us(row.time.p90):>10}{row.rate() / scale:>10.{digits}f}{share:>8.1f}"
            f"{ratios}{_mb(row.peak_bytes):>10}{_mb(row.peer_bytes):>10}",
            flush=True,
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """For each peer the geometric mean of the ratios, and the worst case."""
        result: dict[str, dict[str, Any]] = {}
        for name in self.names:
            ratios = {row.case: row.ratios()[name] for row in self.rows if name in row.peers}
            if ratios and name != self.reference:
                mean = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
                worst = min(ratios, key=lambda case: ratios[case])
                result[name] = {"geomean": mean, "worst": ratios[worst], "worst_case": worst}
        return result

    def print_summary(self) -> None:
        for name, s in self.summary().items():
            print(
                f"against {name}: geomean {s['geomean']:.2f}x, worst {s['worst']:.2f}x "
                f"({s['worst_case']})"
            )

    def finish(self, suffix: str = "") -> None:
        """Writes what the command line asks for; `suffix` tells apart the reports of one run."""
        if self.arguments.json:
            path = _with_suffix(self.arguments.json, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
            print(f"wrote {path}")
        if self.arguments.plot:
            self._plot(_with_suffix(self.arguments.plot, suffix))

    def as_dict(self) -> dict[str, Any]:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        return {
            "op": self.op,
            "device": self.device,
            "date": datetime.now(UTC).date().isoformat(),
            "command": self._command(),
            "commit": commit.stdout.strip(),
            "machine": platform.machine(),
            "info": info(),
            "summary": self.summary(),
            "rows": [
                asdict(row) | {"rate": row.rate(), "ratios": row.ratios()} for row in self.rows
            ],
        }

    def _plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(self.rows) * 2 + 1.5))
        names = self.names
        for i, name in enumerate(names):
            places = [r + 0.8 * i / len(names) for r in range(len(self.rows))]
            values = [row.ratios().get(name, 0.0) for row in self.rows]
            axes.barh(places, values, height=0.8 / len(names), label=f"against {name}")
        axes.set_yticks(range(len(self.rows)), [row.case for row in self.rows], fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("times faster (ratio of medians)")
        cpu = info()["cpu"]
        hardware = cpu["processor"] if self.device == "cpu" else info()["cuda"]["device"]
        axes.set_title(f"{self.op}: {hardware}, {cpu['threads']} threads, {cpu['isa']}", fontsize=9)
        axes.legend(fontsize=8)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        print(f"wrote {path}")


def _with_suffix(name: str, suffix: str) -> Path:
    path = Path(name)
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}us" if seconds < 1e-3 else f"{seconds * 1e3:.2f}ms"


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}MB"
