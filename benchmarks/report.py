# SPDX-License-Identifier: MIT
"""A table of a benchmark: what is compared in a case, its row, the summary of all rows."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.measure import Functions, Time, measure, peak_memory

OURS = "kimi_ops"
MOST_SECONDS = 10.0  # a peer that takes longer is left out
Roof = float | Callable[[dict[str, Time]], float]


@dataclass
class Row:
    case: str
    time: Time
    work: float  # FLOP or bytes of one call, or 1
    unit: str  # "TFLOP/s", "GB/s" or "Mcall/s"
    roof: float  # of the same unit, in FLOP/s, bytes/s or calls/s
    peers: dict[str, Time] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # peer -> why it has no time
    peak_bytes: int = 0
    peer_bytes: int = 0

    def rate(self) -> float:
        return self.work / self.time.median

    def ratios(self) -> dict[str, float]:
        return {name: peer.median / self.time.median for name, peer in self.peers.items()}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rate": self.rate(), "ratios": self.ratios()}


class Table:
    """Measures cases and prints their rows as they come.

    `peers` names the columns of ratios where not every row has them all, `reference` one of them
    that does other work and stays out of the summary; `memory` is the peer whose peak stands beside
    ours; `width` is that of the cases' names. `after` is called behind every row.
    """

    def __init__(
        self,
        op: str,
        device: str,
        quick: bool = False,
        *,
        width: int = 34,
        peers: Sequence[str] = (),
        reference: str | None = None,
        memory: str = "torch",
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.op, self.device, self.quick = op, device, quick
        self.width, self.names, self.reference = width, list(peers), reference
        self.memory, self.after = memory, after
        self.rows: list[Row] = []

    def compare(self, case: object, named: Functions, work: float, unit: str, roof: Roof) -> Row:
        """Times ours and the peers in turn; a peer that fails or takes too long is left out with a
        word, ours may not."""
        served, left_out = _served(named, self.device)
        for name, why in left_out.items():
            print(f"{case}: without {name}: {why}", flush=True)
        times = measure(served, self.device, self.quick)
        limit = roof(times) if callable(roof) else roof
        row = Row(str(case), times.pop(OURS), work, unit, limit, times, left_out)
        row.peak_bytes = peak_memory(served[OURS], self.device)
        if self.memory in served:
            row.peer_bytes = peak_memory(served[self.memory], self.device)
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        if not self.rows:
            self.names = self.names or list(row.peers)
            self._print_head(row)
        self.rows.append(row)
        scale, digits = {"TFLOP/s": (1e12, 3), "GB/s": (1e9, 2), "Mcall/s": (1e6, 4)}[row.unit]
        found, share = row.ratios(), 100 * row.rate() / row.roof
        cells = {n: f"{found[n]:.2f}" if n in found else "-" for n in self.names}
        ratios = "".join(f"{cell:>{_wide(n)}}" for n, cell in cells.items())
        clock = "" if row.time.mhz is None else f"{row.time.mhz:>8.0f}"
        print(
            f"{row.case:<{self.width}}{_us(row.time.median):>10}{_us(row.time.p10):>10}"
            f"{_us(row.time.p90):>10}{row.rate() / scale:>10.{digits}f}{share:>8.1f}{clock}"
            f"{ratios}{_mb(row.peak_bytes):>10}{_mb(row.peer_bytes):>10}",
            flush=True,
        )
        self.after()

    def _print_head(self, row: Row) -> None:
        peers = "".join(f"{'x ' + name:>{_wide(name)}}" for name in self.names)
        clock = "" if row.time.mhz is None else f"{'MHz':>8}"
        memory = f"{'peak':>10}{self.memory.split()[-1]:>10}"
        print(
            f"\n# {self.op} on {self.device}\n{'case':<{self.width}}{'median':>10}{'p10':>10}"
            f"{'p90':>10}{row.unit:>10}{'% roof':>8}{clock}{peers}{memory}"
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

    def as_dict(self) -> dict[str, Any]:
        rows = [row.as_dict() for row in self.rows]
        return {"op": self.op, "summary": self.summary(), "rows": rows}


def _served(named: Functions, device: str) -> tuple[Functions, dict[str, str]]:
    """The functions that run within their time, and why others are left out."""
    served, left_out = {OURS: named[OURS]}, {}
    for name, function in named.items():
        if name == OURS:
            continue
        start = time.perf_counter()
        try:
            function()
            if device == "cuda":
                torch.cuda.synchronize()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            left_out[name] = (str(error) or repr(error)).splitlines()[0][:200]
            continue
        if (taken := time.perf_counter() - start) > MOST_SECONDS:
            left_out[name] = f"{taken:.0f} s a call"
        else:
            served[name] = function
    return served, left_out


def _wide(name: str) -> int:
    return max(16, len(name) + 4)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}us" if seconds < 1e-3 else f"{seconds * 1e3:.2f}ms"


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}MB"
