# SPDX-License-Identifier: MIT
"""newton_schulz against torch.optim.Muon's, and the same iteration in eager and compiled torch.

Peers: "torch" is what torch.optim.Muon runs on a matrix, one matrix after the other; "batched" the
same quintic on the stack, "compiled" that through torch.compile. Peers in bf16, kimi_ops in what
the case says; five steps of the quintic from an fp32 matrix. TFLOP/s counts the operations that the
standard form needs (20 m^2 n + 10 m^3), whatever a method saves; "real" counts what it does. Roof:
torch's large dense bf16 product in the same run.

    python -m benchmarks.bench_newton_schulz [--help]
"""

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.cases import MatrixCase, matrix_cases
from benchmarks.marks import parametrize
from benchmarks.measure import Functions
from benchmarks.session import Session, main
from kimi_ops import newton_schulz, ns_flops

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


def ways(case: MatrixCase, device: str, compiled: bool) -> Functions:
    g = torch.randn(case.count, case.rows, case.cols, device=device)
    named: Functions = {
        "kimi_ops": lambda: newton_schulz(g, method=case.method, dtype=getattr(torch, case.dtype))
    }
    named["torch"] = lambda: torch_muon(g)
    named["batched"] = lambda: quintic(g)
    if compiled:
        function = torch.compile(quintic, dynamic=False)
        named["compiled"] = lambda: function(g)
    return named


def compare(session: Session) -> None:
    table, real = session.table("newton_schulz"), []
    roof = session.peak(torch.bfloat16)
    for case in session.select(matrix_cases(session.quick, session.device)):
        shape = (case.count, case.rows, case.cols)
        work = ns_flops(shape, 5, "standard")
        named = ways(case, session.device, session.compiled)
        row = table.compare(case, named, work, "TFLOP/s", roof)
        real.append((case, ns_flops(shape, 5, case.method) / row.time.median))
    print(f"\nreal operations, roof {roof / 1e12:.3f} TFLOP/s")
    for case, rate in real:
        print(f"{case!s:<34}{rate / 1e12:>10.3f} TFLOP/s{100 * rate / roof:>8.1f} %")


@parametrize("case", matrix_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", "torch"])
def test_newton_schulz(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"newton_schulz {case}"
    benchmark(ways(case, "cpu", compiled=False)[way])


if __name__ == "__main__":
    main(compare)
