# SPDX-License-Identifier: MIT
"""newton_schulz against torch.optim.Muon's, and the same iteration in eager and compiled torch.

Peers: "torch" is what torch.optim.Muon runs on a matrix, one matrix after the other; "batched" the
same quintic on the stack, "compiled" that through torch.compile. All in bf16, five steps of the
quintic from an fp32 matrix. TFLOP/s counts the operations that the standard form needs (20 m^2 n +
10 m^3), whatever a method saves; "real" counts what it does. Roof: torch's bf16 product of 4096 x
4096 matrices in the same run.

    python -m benchmarks.bench_newton_schulz [--quick] [--json FILE] [--plot FILE]
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.cases import MatrixCase, arguments, matrix_cases
from benchmarks.measure import measure, peak_memory
from benchmarks.report import Report, Row
from kimi_ops import newton_schulz, ns_flops

Functions = dict[str, Callable[[], object]]
QUINTIC = (3.4445, -4.7750, 2.0315)


def torch_muon(g: Tensor) -> list[Tensor]:
    return [_zeropower_via_newtonschulz(x, QUINTIC, 5, 1e-7) for x in g]


def quintic(g: Tensor) -> Tensor:
    """The iteration on [E, m, n] as Muon implementations in torch write it."""
    a, b, c = QUINTIC
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def ways(case: MatrixCase, compiled: bool) -> Functions:
    g = torch.randn(case.count, case.rows, case.cols)
    named: Functions = {
        "kimi_ops": lambda: newton_schulz(g, method=case.method, dtype=torch.bfloat16)
    }
    named["torch"] = lambda: torch_muon(g)
    named["batched"] = lambda: quintic(g)
    if compiled:
        function = torch.compile(quintic, dynamic=False)
        named["compiled"] = lambda: function(g)
    return named


def product_roof(device: str) -> float:
    """Operations a second of torch's bf16 product."""
    a, b = torch.randn(4096, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    return 2 * 4096**3 / measure({"matmul": lambda: a @ b}, device, quick=True)["matmul"].p10


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__ or "").parse_args(argv)
    roof = product_roof(options.device)
    report = Report("newton_schulz", options.device, options)
    real = []
    for case in matrix_cases(options.quick):
        named = ways(case, not options.no_compile)
        times = measure(named, options.device, options.quick)
        ours = times.pop("kimi_ops")
        shape = (case.count, case.rows, case.cols)
        row = Row(str(case), ours, ns_flops(shape, 5, "standard"), "TFLOP/s", roof, times)
        row.peak_bytes = peak_memory(named["kimi_ops"], options.device)
        row.peer_bytes = peak_memory(named["torch"], options.device)
        report.add(row)
        real.append((case, ns_flops(shape, 5, case.method) / ours.median))
    print(f"\nreal operations, roof {roof / 1e12:.3f} TFLOP/s")
    for case, rate in real:
        print(f"{case!s:<34}{rate / 1e12:>10.3f} TFLOP/s{100 * rate / roof:>8.1f} %")
    report.finish()


@pytest.mark.parametrize("case", matrix_cases(quick=True), ids=str)
@pytest.mark.parametrize("way", ["kimi_ops", "torch"])
def test_newton_schulz(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"newton_schulz {case}"
    benchmark(ways(case, compiled=False)[way])


if __name__ == "__main__":
    main()
