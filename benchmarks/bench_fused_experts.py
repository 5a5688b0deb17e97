# SPDX-License-Identifier: MIT
"""fused_experts against the experts of transformers' DeepSeek-V3: eager, batched_mm, grouped_mm.

bfloat16, random routing, the same weights in the same memory. "fwd+bwd" takes the gradients of the
tokens and of both stacks. Left out: a peer that needs more than 10 s a call, or writes more than 4
GB on the way: batched_mm copies the chosen matrices for each pair, the backward of eager makes a
stack of zeros for each expert. Roof: the slower of the operations at the rate of a
large dense product and the bytes of the chosen experts' matrices (read twice for gradients, which
are written for all experts) at the read bandwidth. Peak memory: ours, then grouped_mm's. A second
table compares FP8 and INT4 experts with bfloat16.

    python -m benchmarks.bench_fused_experts [--quick] [--threads 1] [--cases TEXT] [--json FILE]
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import ExpertsCase, arguments, experts_cases, select
from benchmarks.measure import compute_peak, measure, peak_memory, read_bandwidth, roof_rate
from benchmarks.report import Report, Row
from kimi_ops import Fp8BlockWeight, Int4GroupWeight, fused_experts, topk_gate

Functions = dict[str, Callable[[], object]]
PEERS = ("eager", "batched_mm", "grouped_mm")
FORMS = {"fp8": Fp8BlockWeight, "int4": Int4GroupWeight}
MOST_SECONDS, MOST_BYTES = 10.0, 4e9


def make_weights(case: ExpertsCase, device: str) -> tuple[Tensor, Tensor]:
    """[E, 2F, H] and [E, H, F]; the values of one expert, each with its own memory."""

    def stack(rows: int, columns: int) -> Tensor:
        one = (torch.randn(rows, columns, device=device) / columns**0.5).bfloat16()
        return one.expand(case.experts, rows, columns).contiguous()

    return stack(2 * case.width, case.hidden), stack(case.hidden, case.width)


def transformers_experts(case: ExpertsCase, way: str, weights: tuple[Tensor, Tensor]) -> Any:
    """DeepseekV3Experts over the given memory."""
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = transformers.DeepseekV3Config(
        hidden_size=case.hidden, moe_intermediate_size=case.width, n_routed_experts=case.experts
    )
    config._experts_implementation = way
    with torch.device("meta"):
        experts = DeepseekV3Experts(config)
    experts.gate_up_proj = torch.nn.Parameter(weights[0])
    experts.down_proj = torch.nn.Parameter(weights[1])
    return experts


def written_by(way: str, case: ExpertsCase) -> int:
    """Bytes that a peer writes beside its results."""
    if way == "batched_mm":
        return case.tokens * case.k * case.expert_bytes
    return case.experts**2 * case.expert_bytes if way == "eager" and case.backward else 0


class Setting:
    """One case's tensors and the ways that are compared."""

    def __init__(self, case: ExpertsCase, weights: tuple[Tensor, Tensor]) -> None:
        self.case, self.weights = case, weights
        device = weights[0].device
        torch.manual_seed(0)
        gate = topk_gate(torch.randn(case.tokens, case.experts), case.k)
        self.indices, self.gates = gate.indices.to(device), gate.weights.to(device)
        self.x = torch.randn(case.tokens, case.hidden).bfloat16().to(device)
        self.dy = torch.randn(case.tokens, case.hidden).bfloat16().to(device)
        self.active = len(self.indices.unique())

    def functions(self) -> Functions:
        x = self.x.detach().requires_grad_(self.case.backward)
        leaves = [x, *(w.detach().requires_grad_(self.case.backward) for w in self.weights)]
        named = {
            "kimi_ops": self._timed(
                lambda: fused_experts(*leaves, self.gates, self.indices), leaves
            )
        }
        ids = self.indices.long()
        for way in PEERS:
            if written_by(way, self.case) > MOST_BYTES:
                continue
            experts = transformers_experts(self.case, way, self.weights)
            theirs = [x, experts.gate_up_proj, experts.down_proj]
            named[way] = self._timed(lambda e=experts: e(x, ids, self.gates), theirs)
        return named

    def _timed(self, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        def plain() -> Tensor:
            with torch.no_grad():
                return forward()

        def both() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(forward(), leaves, self.dy)

        return both if self.case.backward else plain

    def moved(self) -> int:
        rows = 2 * 2 * self.case.tokens * self.case.hidden
        read = self.active * self.case.expert_bytes
        written = self.case.experts * self.case.expert_bytes
        return 2 * read + written + 2 * rows if self.case.backward else read + rows


def quick_enough(named: Functions) -> Functions:
    """Without the peers that take too long a call."""
    kept = {}
    for name, function in named.items():
        start = time.perf_counter()
        if name != "kimi_ops":
            function()
        if time.perf_counter() - start <= MOST_SECONDS:
            kept[name] = function
    return kept


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__ or "").parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    bandwidth, peak = read_bandwidth(device), compute_peak(torch.bfloat16, device)
    report = Report("fused_experts", device, options, width=40, peers=PEERS)
    print(f"read bandwidth of this run: {bandwidth / 1e9:.1f} GB/s; ", end="")
    print(f"dense bfloat16 product: {peak / 1e12:.3f} TFLOP/s\n")
    model, weights = "", None
    for case in select(experts_cases(options.quick, device), options):
        if model != case.model:
            weights = None  # before the next are made
            model, weights = case.model, make_weights(case, device)
        assert weights is not None
        setting = Setting(case, weights)
        named = quick_enough(setting.functions())
        times = measure(named, device, options.quick)
        roof = roof_rate(case.flops, setting.moved(), peak, bandwidth)
        row = Row(str(case), times.pop("kimi_ops"), case.flops, "TFLOP/s", roof, times)
        row.peak_bytes = peak_memory(named["kimi_ops"], device)
        row.peer_bytes = peak_memory(named["grouped_mm"], device) if "grouped_mm" in named else 0
        report.add(row)
    report.print_summary()
    report.finish()
    if device == "cpu" and not options.cases:
        quantized(options, peak, bandwidth)


def quantized_cases(quick: bool) -> list[ExpertsCase]:
    """Forward with few tokens: the bytes of the experts are the time."""
    cases = [ExpertsCase("E 64, H 2048, F 768", 64, 2048, 768, t) for t in (1, 16)]
    return cases[:1] if quick else [*cases, ExpertsCase("K2 E 16", 16, 7168, 2048, 1)]


def quantized_functions(
    case: ExpertsCase, form: str, weights: tuple[Tensor, Tensor]
) -> tuple[Functions, float]:
    """With quantised experts and with bfloat16; the bytes that the first one reads."""
    setting = Setting(case, weights)
    packed = [FORMS[form].quantize(w) for w in weights]
    stored = sum(tensor.nbytes for w in packed for tensor in w.tensors().values())
    rest = (setting.gates, setting.indices)

    def ours() -> Tensor:
        with torch.no_grad():
            return fused_experts(setting.x, *packed, *rest)

    def bf16() -> Tensor:
        with torch.no_grad():
            return fused_experts(setting.x, *weights, *rest)

    rows = 2 * setting.x.nbytes
    return {"kimi_ops": ours, "bf16": bf16}, rows + stored * setting.active / case.experts


def quantized(options: Any, peak: float, bandwidth: float) -> None:
    """FP8 and INT4 experts against our own with bfloat16."""
    print()
    report = Report("fused_experts (quantized)", "cpu", options, width=40)
    for case in quantized_cases(options.quick):
        weights = make_weights(case, "cpu")
        for form in FORMS:
            named, moved = quantized_functions(case, form, weights)
            times = measure(named, "cpu", options.quick)
            roof = roof_rate(case.flops, moved, peak, bandwidth)
            ours = times.pop("kimi_ops")
            row = Row(f"{case} {form}", ours, case.flops, "TFLOP/s", roof, times)
            row.peak_bytes = peak_memory(named["kimi_ops"], "cpu")
            row.peer_bytes = peak_memory(named["bf16"], "cpu")
            report.add(row)
    report.print_summary()
    report.finish("_quantized")


@pytest.mark.parametrize("case", experts_cases(quick=True), ids=str)
@pytest.mark.parametrize("way", ["kimi_ops", *PEERS])
def test_fused_experts(benchmark, case, way):  # type: ignore[no-untyped-def]
    named = Setting(case, make_weights(case, "cpu")).functions()
    if way not in named:
        pytest.skip(f"{way} writes more than {MOST_BYTES / 1e9:.0f} GB on the way")
    benchmark.group = f"fused_experts {case}"
    benchmark(named[way])


if __name__ == "__main__":
    main()
