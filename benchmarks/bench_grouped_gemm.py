# SPDX-License-Identifier: MIT
"""grouped_gemm, its dgrad and wgrad against F.grouped_mm, a loop of torch.mm and a dense product;
on a GPU against a Triton kernel too, where triton is there.

dgrad and wgrad run through autograd on both sides (one gradient wanted, graph kept); "wgrad acc" is
`grouped_gemm_wgrad` into an fp32 buffer against adding the gradient of a peer to it. "F.linear" is
a reference, no peer: all rows times the matrix of one expert. Roof: the slower of the operations at
the rate of a large dense product and the bytes (rows, the weights of experts with rows, results) at
the read bandwidth, both of this run. A second table compares FP8 and INT4 weights with bfloat16; on
a GPU it is that of FP8 rows and weights, against our own bfloat16 and torch._scaled_grouped_mm (one
scale a row and a column), where the roof of operations is twice that of bfloat16.

    python -m benchmarks.bench_grouped_gemm [--help]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import (
    GEMM_SHAPES,
    GemmCase,
    fp8_cases,
    gemm_cases,
    quantized_cases,
)
from benchmarks.marks import parametrize
from benchmarks.measure import Functions, roof_rate
from benchmarks.session import Session, main
from benchmarks.triton_peer import triton_grouped_gemm
from kimi_ops import Fp8BlockWeight, Fp8Rows, Int4GroupWeight, grouped_gemm, grouped_gemm_wgrad

PEERS = ("grouped_mm", "mm loop", "F.linear")
CUDA_PEERS = ("grouped_mm", "mm loop", "triton", "F.linear")
FORMS = {"fp8": Fp8BlockWeight, "int4": Int4GroupWeight}


def sizes_of(case: GemmCase) -> Tensor:
    """Rows of each expert."""
    generator = torch.Generator().manual_seed(0)
    if case.skew == "balanced":
        return torch.full((case.experts,), case.rows)
    if case.skew == "decode":
        chosen = torch.rand(case.rows, case.experts, generator=generator).topk(8, dim=1).indices
        return torch.bincount(chosen.flatten(), minlength=case.experts)
    hot = case.total // 2
    draws = torch.randint(0, case.experts, (case.total - hot,), generator=generator)
    return (
        torch.bincount(draws, minlength=case.experts)
        + F.one_hot(torch.tensor(case.experts // 2), case.experts) * hot
    )


def make_weight(case: GemmCase, device: str) -> Tensor:
    """[E, N, K], every expert with its own memory; the values of one are enough."""
    k, n = GEMM_SHAPES[case.shape]
    one = (torch.randn(n, k, device=device) / k**0.5).to(getattr(torch, case.dtype))
    return one.expand(case.experts, n, k).contiguous()


class Setting:
    """One case's tensors and the ways that are compared."""

    def __init__(self, case: GemmCase, weight: Tensor) -> None:
        self.case, self.weight = case, weight
        k, n = GEMM_SHAPES[case.shape]
        sizes = sizes_of(case)
        self.active = int((sizes > 0).sum())
        self.offsets = sizes.cumsum(0).int().to(weight.device)
        ends = [0, *self.offsets.tolist()]
        self.groups = [
            (e, slice(*ends[e : e + 2])) for e in range(case.experts) if ends[e + 1] > ends[e]
        ]
        like = {"dtype": weight.dtype, "device": weight.device}
        self.a, self.dc = (
            torch.randn(case.total, width, device=weight.device).to(**like) for width in (k, n)
        )

    def functions(self) -> Functions:
        return getattr(self, f"_{self.case.what.replace(' ', '_')}")()

    def moved(self) -> int:
        """Bytes that have to be read and written."""
        k, n = GEMM_SHAPES[self.case.shape]
        size, rows = self.a.element_size(), self.case.total
        matrices = {
            "fwd": self.active * size,
            "dgrad": self.active * size,
            "wgrad": self.case.experts * size,
            "wgrad acc": self.active * 8,
        }
        return rows * (k + n) * size + matrices[self.case.what] * k * n

    def _fwd(self) -> Functions:
        b, out = self.weight.mT, self.a.new_empty(self.case.total, self.weight.shape[1])

        def loop() -> Tensor:
            for e, rows in self.groups:
                torch.mm(self.a[rows], b[e], out=out[rows])
            return out

        named: Functions = {
            "kimi_ops": lambda: grouped_gemm(self.a, b, self.offsets),
            "grouped_mm": lambda: F.grouped_mm(self.a, b, offs=self.offsets),
            "mm loop": loop,
            "F.linear": lambda: F.linear(self.a, self.weight[0]),
        }
        return named | self._triton(self.a, b)

    def _triton(self, a: Tensor, b: Tensor) -> Functions:
        if not a.is_cuda or triton_grouped_gemm is None or a.dtype == torch.float32:
            return {}
        multiply = triton_grouped_gemm
        return {"triton": lambda: multiply(a, b, self.offsets)}

    def _graphs(self, of_rows: bool) -> Functions:
        """The gradient in a or in the weight by autograd."""
        a = self.a.detach().requires_grad_(of_rows)
        weight = self.weight.detach().requires_grad_(not of_rows)
        wanted = a if of_rows else weight
        with torch.enable_grad():
            ours = grouped_gemm(a, weight.mT, self.offsets)
            theirs = F.grouped_mm(a, weight.mT, offs=self.offsets)
        return {
            "kimi_ops": lambda: torch.autograd.grad(ours, wanted, self.dc, retain_graph=True)[0],
            "grouped_mm": lambda: torch.autograd.grad(theirs, wanted, self.dc, retain_graph=True)[
                0
            ],
        }

    def _dgrad(self) -> Functions:
        da = torch.empty_like(self.a)

        def loop() -> Tensor:
            for e, rows in self.groups:
                torch.mm(self.dc[rows], self.weight[e], out=da[rows])
            return da

        named = self._graphs(of_rows=True)
        named |= {"mm loop": loop, "F.linear": lambda: torch.mm(self.dc, self.weight[0])}
        return named | self._triton(self.dc, self.weight)

    def _wgrad(self) -> Functions:
        def loop() -> Tensor:
            dw = torch.empty_like(self.weight)
            if len(self.groups) < self.case.experts:
                dw.zero_()
            for e, rows in self.groups:
                torch.mm(self.dc[rows].t(), self.a[rows], out=dw[e])
            return dw

        named = self._graphs(of_rows=False)
        return named | {"mm loop": loop, "F.linear": lambda: torch.mm(self.dc.t(), self.a)}

    def _wgrad_acc(self) -> Functions:
        main = torch.zeros(self.weight.shape, device=self.weight.device)
        gradient = self._graphs(of_rows=False)["grouped_mm"]

        def theirs() -> Tensor:
            new = gradient()
            assert isinstance(new, Tensor)
            return main.add_(new)

        def loop() -> Tensor:
            for e, rows in self.groups:
                main[e].add_(torch.mm(self.dc[rows].t(), self.a[rows]))
            return main

        def ours() -> Tensor:
            grouped_gemm_wgrad(self.a, self.dc, self.offsets, out=main.mT, accumulate=True)
            return main

        def dense() -> Tensor:
            return main[0].add_(torch.mm(self.dc.t(), self.a))

        return {"kimi_ops": ours, "grouped_mm": theirs, "mm loop": loop, "F.linear": dense}


def compare(session: Session) -> None:
    device = session.device
    peers = CUDA_PEERS if device == "cuda" else PEERS
    table = session.table(
        "grouped_gemm", width=44, peers=peers, reference="F.linear", memory="grouped_mm"
    )
    weight: Tensor | None = None
    kind: tuple[object, ...] = ()
    for case in session.select(gemm_cases(session.quick, device)):
        if kind != (case.shape, case.experts, case.dtype):
            weight = None  # before the next is made
            kind, weight = (case.shape, case.experts, case.dtype), make_weight(case, device)
        assert weight is not None
        with torch.no_grad():
            setting = Setting(case, weight)
            named = setting.functions()
            if not session.compiled:
                named.pop("triton", None)
            peak = session.peak(getattr(torch, case.dtype))
            roof = roof_rate(case.flops, setting.moved(), peak, session.bandwidth)
            table.compare(case, named, case.flops, "TFLOP/s", roof)
    weight = None
    quantized(session) if device == "cpu" else fp8(session)


def quantized_functions(case: GemmCase, form: str) -> tuple[Functions, int]:
    """The product with quantised weights and with bfloat16, and the bytes the first one reads."""
    setting = Setting(case, make_weight(case, "cpu"))
    packed = FORMS[form].quantize(setting.weight)
    stored = sum(tensor.nbytes for tensor in packed.tensors().values())
    b = setting.weight.mT
    named: Functions = {
        "kimi_ops": lambda: grouped_gemm(setting.a, packed, setting.offsets),
        "bf16": lambda: grouped_gemm(setting.a, b, setting.offsets),
    }
    rows = setting.a.nbytes + setting.dc.nbytes
    return named, rows + stored * setting.active // case.experts


def quantized(session: Session) -> None:
    """FP8 and INT4 weights against our own product with bfloat16."""
    table = session.table("grouped_gemm (quantized)", width=44, memory="bf16")
    cases = {f"{c} {form}": (c, form) for c in quantized_cases(session.quick) for form in FORMS}
    for name in session.select(list(cases)):
        case, form = cases[name]
        with torch.no_grad():
            named, moved = quantized_functions(case, form)
            roof = roof_rate(case.flops, moved, session.peak(torch.bfloat16), session.bandwidth)
            table.compare(name, named, case.flops, "TFLOP/s", roof)


def fp8_functions(case: GemmCase, weight: Tensor) -> tuple[Functions, int]:
    """The product of FP8 rows, of bfloat16 and torch's; the bytes that the first one moves."""
    setting = Setting(case, weight)
    rows, packed = Fp8Rows.quantize(setting.a), Fp8BlockWeight.quantize(weight)
    b, offsets = weight.mT, setting.offsets
    named: Functions = {
        "kimi_ops": lambda: grouped_gemm(rows, packed, offsets),
        "bf16": lambda: grouped_gemm(setting.a, b, offsets),
        "quantize": lambda: Fp8Rows.quantize(setting.a),
    }
    ones_of_rows = torch.ones(case.total, device=weight.device)
    ones_of_columns = torch.ones(weight.shape[:2], device=weight.device)

    def theirs() -> object:
        return torch._scaled_grouped_mm(
            rows.data, packed.data.mT, ones_of_rows, ones_of_columns, offs=offsets,
            out_dtype=torch.bfloat16,
        )  # fmt: skip

    named["scaled_grouped_mm"] = theirs
    stored = sum(tensor.nbytes for tensor in packed.tensors().values())
    moved = rows.data.nbytes + rows.scale.nbytes + setting.dc.nbytes
    return named, moved + stored * setting.active // case.experts


def fp8(session: Session) -> None:
    """FP8 rows and weights; "quantize" is what the rows cost before."""
    names = ("bf16", "scaled_grouped_mm", "quantize")
    table = session.table(
        "grouped_gemm (fp8)", width=44, peers=names, reference="quantize", memory="bf16"
    )
    for case in session.select(fp8_cases(session.quick)):
        with torch.no_grad():
            named, moved = fp8_functions(case, make_weight(case, "cuda"))
            peak = 2 * session.peak(torch.bfloat16)
            roof = roof_rate(case.flops, moved, peak, session.bandwidth)
            table.compare(f"{case} fp8", named, case.flops, "TFLOP/s", roof)


@parametrize("case", gemm_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", *PEERS])
def test_grouped_gemm(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"grouped_gemm {case}"
    with torch.no_grad():
        benchmark(Setting(case, make_weight(case, "cpu")).functions()[way])


@parametrize("case", quantized_cases(quick=True), ids=str)
@parametrize("form", FORMS)
@parametrize("way", ["kimi_ops", "bf16"])
def test_quantized(benchmark, case, form, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"grouped_gemm {case} {form}"
    with torch.no_grad():
        benchmark(quantized_functions(case, form)[0][way])


if __name__ == "__main__":
    main(compare)
