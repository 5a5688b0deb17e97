# SPDX-License-Identifier: MIT
"""ExpertParallel's dispatch and combine over shared memory, against gloo and against memcpy.

Processes of this machine, bound to its cores in turn; H 7168, bf16, top 8, uniform routing. All
ways take turns, each behind a barrier; a time is that of the slowest rank, the row shows the
median. Peers:

    gloo      the gloo backend: the same call
    raw       all_to_all_single of the same records with gloo, nothing sorted and nothing added
    fresh     each process clones what the call writes to new memory, and copies the rest
    memcpy    the same bytes, all into memory that is there

A dispatch writes the tokens of a rank once (T H) and its rows (R H, new memory: about 8 T / P of
each rank); a combine the sums of its records (about u T H, u ranks a token) and of its tokens (T H,
new memory). The roof is that of memcpy.
GB/s are bytes of records that ranks get from all ranks (logical), or from others only (wire).

On a GPU (--device cuda) the ranks of a LocalWorld share it, up to 8 in a launch: see one_gpu.py.

    python -m benchmarks.bench_all_to_all [--ranks 2,4] [--tokens 64,512,2048] [--device cuda]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import one_gpu
from benchmarks.measure import Time, peak_memory
from benchmarks.options import numbers, parse, parser
from benchmarks.processes import samples, told
from benchmarks.report import OURS, Row
from benchmarks.session import Session
from kimi_ops import ExpertParallel, topk_gate
from kimi_ops.parallel.results import Dispatched
from kimi_ops.parallel.segment import available_memory

HIDDEN, TOP_K, EXPERTS = 7168, 8, (64, 384)
OPS = ("dispatch", "combine")
RANKS, TOKENS = (2, 4), (64, 512, 2048)
BUDGET, QUICK = 2.0, 0.5  # seconds a way


@dataclass(frozen=True)
class Case:
    ranks: int
    tokens: int
    experts: int

    def __str__(self) -> str:
        return f"ranks{self.ranks} tokens{self.tokens} experts{self.experts}"


def too_large(case: Case) -> str | None:
    """Why this machine has not the memory for a case: a rank keeps about ten times the rows that it
    gets, in results, windows of both backends and the peers' buffers, beside 0.4 GB of torch."""
    rows = case.tokens * TOP_K * 2 * HIDDEN
    needed, free = case.ranks * (10 * rows + 400_000_000), available_memory()
    if needed <= free:
        return None
    return f"{case}: not run, it takes about {needed / 1e9:.0f} of {free / 1e9:.0f} GB of memory"


@dataclass
class MovedRow(Row):
    """A row with the 99th percentile, what ranks got (bytes, all ranks together), and the median
    processor time of every way: what others do on the machine hardly changes it."""

    p99: float = 0.0
    processor: dict[str, float] = field(default_factory=dict)
    logical: int = 0
    wire: int = 0


class Rank:
    """One rank's tensors and ways of a case."""

    def __init__(self, case: Case, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        logits = torch.randn(case.tokens, case.experts, generator=generator)
        self.case, self.gate = case, topk_gate(logits, TOP_K)
        self.x = torch.randn(case.tokens, HIDDEN, generator=generator).bfloat16()
        options = {"num_experts": case.experts, "hidden": HIDDEN}
        self.ranks = {
            name: ExpertParallel(backend=name, max_tokens_per_rank=case.tokens, **options)
            for name in ("shm", "gloo")
        }
        rows = self.dispatch("shm")
        self.route = rows.handle.route
        self.sent, self.received = sum(self.route.sent), sum(self.route.received)
        self.row_bytes = 2 * HIDDEN + 8 * TOP_K  # a record: values, ids, weights
        self.buffer = torch.zeros(self.sent, self.row_bytes, dtype=torch.uint8)
        self.arrived = torch.zeros(self.received, self.row_bytes, dtype=torch.uint8)
        self.rows = rows.x
        self.there = torch.empty_like(rows.x)
        self.records = torch.zeros(self.received, HIDDEN, dtype=torch.bfloat16)
        self.tokens, self.sums = torch.empty_like(self.x), torch.empty_like(self.records)
        self.last: dict[str, Dispatched] = {}

    def dispatch(self, name: str) -> Dispatched:
        return self.ranks[name].dispatch(self.x, self.gate.indices, self.gate.weights)

    def keep(self, name: str) -> None:
        self.last[name] = self.dispatch(name)

    def combine(self, name: str) -> Tensor:
        last = self.last.pop(name)
        return self.ranks[name].combine(last.x, last.handle)

    def raw(self, back: bool) -> None:
        width = 2 * HIDDEN if back else self.row_bytes
        ends = [(self.buffer, self.route.sent), (self.arrived, self.route.received)]
        (source, sent), (target, received) = reversed(ends) if back else ends
        sizes = [[count * width for count in counts] for counts in (received, sent)]
        flat = [
            part.view(-1)[: sum(size)] for part, size in ((target, sizes[0]), (source, sizes[1]))
        ]
        dist.all_to_all_single(*flat, *sizes)

    def copies(self, fresh: bool) -> list[Callable[[], object]]:
        """The bytes that a dispatch and a combine write, in as many pieces."""
        if fresh:
            return [
                lambda: (self.tokens.copy_(self.x), self.rows.clone()),
                lambda: (self.sums.copy_(self.records), self.x.clone()),
            ]
        return [
            lambda: (self.tokens.copy_(self.x), self.there.copy_(self.rows)),
            lambda: (self.sums.copy_(self.records), self.tokens.copy_(self.x)),
        ]

    def ways(self) -> list[tuple[str, str, Callable[[], object]]]:
        """(op, way, function) in turns; a combine stands behind its dispatch."""
        pairs: dict[str, list[Callable[[], object]]] = {
            OURS: [lambda: self.keep("shm"), lambda: self.combine("shm")],
            "gloo": [lambda: self.keep("gloo"), lambda: self.combine("gloo")],
            "raw": [lambda: self.raw(back=False), lambda: self.raw(back=True)],
            "fresh": self.copies(fresh=True),
            "memcpy": self.copies(fresh=False),
        }
        return [(op, way, pairs[way][i]) for way in pairs for i, op in enumerate(OPS)]


def _samples(rank: Rank, budget: float) -> dict[str, dict[str, list[list[float]]]]:
    """Seconds and seconds of processor time, of the slowest rank, by op and way."""
    ways = rank.ways()
    found: dict[str, dict[str, list[list[float]]]] = {op: {} for op in OPS}
    times = samples([function for _, _, function in ways], budget)
    for (op, way, _), taken in zip(ways, times, strict=True):
        found[op][way] = taken
    return found


@torch.no_grad()
def _work(index: int, case: Case, budget: float) -> dict[str, Any]:
    rank = Rank(case, index)
    counts = torch.tensor([rank.received, rank.received - rank.route.received[index]])
    dist.all_reduce(counts)
    times = _samples(rank, budget)
    functions = {(op, way): function for op, way, function in rank.ways()}
    peaks = {
        way: {op: peak_memory(functions[op, way], "cpu") for op in OPS} for way in (OURS, "gloo")
    }
    for ep in rank.ranks.values():
        ep.close()
    return {"times": times, "records": counts.tolist(), "peaks": peaks}


def _row(case: Case, op: str, times: dict[str, list[list[float]]], records: list[int]) -> MovedRow:
    # a combine brings each record's sum back, to the rank that its token is of
    logical, wire = (count * 2 * HIDDEN for count in records)
    taken = sorted(times[OURS][0])
    named = {way: Time.of(found) for way, (found, _) in times.items()}
    processor = {way: Time.of(worked).median for way, (_, worked) in times.items()}
    ours = named.pop(OURS)
    p99 = taken[round(0.99 * (len(taken) - 1))]
    roof = logical / named["memcpy"].median
    return MovedRow(
        f"{op} {case}", ours, logical, "GB/s", roof, named, p99=p99, processor=processor,
        logical=logical, wire=wire,
    )  # fmt: skip


def compare(session: Session) -> None:
    gpu = session.device == "cuda"
    ranks, tokens = (
        tuple(getattr(session.options, name, None) or default)
        for name, default in (
            ("ranks", one_gpu.RANKS if gpu else RANKS),
            ("tokens", one_gpu.TOKENS if gpu else TOKENS),
        )
    )
    if gpu:  # quick: 8 ranks, a decode and a prefill
        if session.quick:
            ranks, tokens = ranks[-1:], tokens[3::2]
        return one_gpu.compare(session, ranks, tokens)
    if session.quick:
        ranks, tokens = ranks[:1], tokens[:2]
    budget = QUICK if session.quick else BUDGET
    tables = {op: session.table(f"all_to_all ({op})", width=42, memory="gloo") for op in OPS}
    for count in ranks:
        cases = []
        for case in session.select([Case(count, t, e) for t in tokens for e in EXPERTS]):
            if reason := too_large(case):
                print(reason, flush=True)
            else:
                cases.append(case)
        if not cases:
            continue
        for case, found in told(_work, cases, count, budget):
            for op, table in tables.items():
                row = _row(case, op, found["times"][op], found["records"])
                row.peak_bytes, row.peer_bytes = (found["peaks"][w][op] for w in (OURS, "gloo"))
                table.add(row)
                print(
                    f"    p99 {1e3 * row.p99:.2f} ms of "
                    f"{len(found['times'][op][OURS][0])} rounds; "
                    f"logical {row.logical / row.time.median / 1e9:.2f} GB/s, "
                    f"wire {row.wire / row.time.median / 1e9:.2f} GB/s; processor ms: "
                    + ", ".join(f"{way} {1e3 * t:.2f}" for way, t in row.processor.items()),
                    flush=True,
                )


def options() -> argparse.ArgumentParser:
    made = parser("benchmarks.bench_all_to_all", __doc__ or "")
    words = "ranks, each a process (default: 2,4), or of one GPU (2,4,8)"
    made.add_argument("--ranks", type=numbers, metavar="P,..", help=words)
    words = "tokens of a rank (default: 64,512,2048; 1,8,32,128,512,4096 on a GPU)"
    made.add_argument("--tokens", type=numbers, metavar="T,..", help=words)
    return made


if __name__ == "__main__":
    run = Session(parse(options(), None))
    compare(run)
    run.finish()
