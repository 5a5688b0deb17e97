# SPDX-License-Identifier: MIT
"""Do our threads and torch's fight? A torch op and topk_gate in turn against the sum of both.

One OpenMP runtime: the pair costs the sum of its parts, 1.0. Two runtimes, each with threads that
spin after their work: the pair costs more, and the ratio falls below 1.

    python -m benchmarks.bench_threads [--help]
"""

import torch

from benchmarks.measure import Time, measure
from benchmarks.report import Row
from benchmarks.session import Session, main
from kimi_ops import _native, topk_gate


def compare(session: Session) -> None:
    if session.device != "cpu":
        print("threads is left out: it is about the CPU's")
        return
    table = session.table("threads", peers=("the sum",), width=44, memory="none")
    logits, x = torch.randn(512, 384), torch.randn(512, 2048)
    parts = {"torch": lambda: x + 1.0, "topk_gate": lambda: topk_gate(logits, 8)}
    for case in session.select(["a torch op and topk_gate in turn"]):
        with torch.no_grad():
            named = parts | {"in turn": lambda: [part() for part in parts.values()]}
            times = measure(named, "cpu", session.quick)
        one, other = times["torch"], times["topk_gate"]
        moved = logits.nbytes + 2 * x.nbytes
        row = Row(case, times["in turn"], moved, "GB/s", session.bandwidth)
        row.peers["the sum"] = Time(
            one.median + other.median, one.p10 + other.p10, one.p90 + other.p90
        )
        table.add(row)
        runtimes = ", ".join(_native.openmp_runtimes())
        print(f"OpenMP runtimes: {runtimes}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(compare)
