# SPDX-License-Identifier: MIT
"""Do our threads and torch's fight? Times a torch op, topk_gate, and the two in turn.

One OpenMP runtime: the pair costs the sum of its parts. Two runtimes, each with threads that spin
after their work: the pair costs more.

    python -m benchmarks.bench_threads
"""

import torch

from benchmarks.cases import arguments
from benchmarks.measure import measure
from kimi_ops import _native, topk_gate


def main(argv: list[str] | None = None) -> float:
    options = arguments(__doc__ or "").parse_args(argv)
    logits, x = torch.randn(512, 384), torch.randn(512, 2048)

    def gate() -> object:
        return topk_gate(logits, 8)

    def add() -> object:
        return x + 1.0

    def both() -> object:
        return x + 1.0, topk_gate(logits, 8)

    with torch.no_grad():
        times = measure({"torch": add, "topk_gate": gate, "in turn": both}, "cpu", options.quick)
    total = times["torch"].median + times["topk_gate"].median
    ratio = times["in turn"].median / total
    runtimes = ", ".join(_native.openmp_runtimes())
    print(f"OpenMP runtimes: {runtimes}; {torch.get_num_threads()} threads")
    for name, time in times.items():
        spread = f"p10 {time.p10 * 1e6:.1f}, p90 {time.p90 * 1e6:.1f}"
        print(f"{name:<12}{time.median * 1e6:8.1f} us  ({spread})")
    print(f"in turn / sum of the parts = {ratio:.2f}")
    return ratio


if __name__ == "__main__":
    main()
