# SPDX-License-Identifier: MIT
"""fused_experts against the experts of transformers' DeepSeek-V3: eager, batched_mm, grouped_mm.

bfloat16, random routing, the same weights in the same memory. "fwd+bwd" takes the gradients of the
tokens and of both stacks. Left out: a peer that needs more than 10 s a call, or writes more than 4
GB on the way: batched_mm copies the chosen matrices for each pair, the backward of eager makes a
stack of zeros for each expert. Roof: the slower of the operations at the rate of a
large dense product and the bytes of the chosen experts' matrices (read twice for gradients, which
are written for all experts) at the read bandwidth. Peak memory: ours, then grouped_mm's. A second
table compares FP8 and INT4 experts with bfloat16. The last one is decode: from the router's logits
to the experts' sum, gate and plan in one call, beside the two ops apart; on a GPU from a graph. Its
share of the roof is that of the chosen experts' bytes; KIMI_OPS_OVERLAP=0 keeps the launches apart.

    python -m benchmarks.bench_fused_experts [--help]
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import ExpertsCase, decode_cases, experts_cases
from benchmarks.marks import parametrize
from benchmarks.measure import Functions, graphed, roof_rate
from benchmarks.session import Session, main
from kimi_ops import Fp8BlockWeight, Int4GroupWeight, fused_experts, gate_plan, topk_gate

PEERS = ("eager", "batched_mm", "grouped_mm")
FORMS = {"fp8": Fp8BlockWeight, "int4": Int4GroupWeight}
MOST_BYTES = 4e9


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
        for way in PEERS if importlib.util.find_spec("transformers") else ():
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


def compare(session: Session) -> None:
    if importlib.util.find_spec("transformers") is None:
        print("fused_experts: without peers: pip install transformers brings them")
    device = session.device
    table = session.table("fused_experts", width=40, peers=PEERS, memory="grouped_mm")
    model, weights = "", None
    for case in session.select(experts_cases(session.quick, device)):
        if model != case.model:
            weights = None  # before the next are made
            model, weights = case.model, make_weights(case, device)
        assert weights is not None
        setting = Setting(case, weights)
        roof = roof_rate(
            case.flops, setting.moved(), session.peak(torch.bfloat16), session.bandwidth
        )
        table.compare(case, setting.functions(), case.flops, "TFLOP/s", roof)
    if device == "cpu":
        quantized(session)
    decode(session)


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


def quantized(session: Session) -> None:
    """FP8 and INT4 experts against our own with bfloat16."""
    table = session.table("fused_experts (quantized)", width=40, memory="bf16")
    cases = {f"{c} {form}": (c, form) for c in quantized_cases(session.quick) for form in FORMS}
    for name in session.select(list(cases)):
        case, form = cases[name]
        named, moved = quantized_functions(case, form, make_weights(case, "cpu"))
        roof = roof_rate(case.flops, moved, session.peak(torch.bfloat16), session.bandwidth)
        table.compare(name, named, case.flops, "TFLOP/s", roof)


def decode_functions(case: ExpertsCase, weights: tuple[Tensor, Tensor]) -> tuple[Functions, int]:
    """The layer behind its router's logits; the bytes of the experts that they choose."""
    setting = Setting(case, weights)
    logits = torch.randn(case.tokens, case.experts).to(setting.x.device)
    active = len(topk_gate(logits, case.k).indices.unique())

    @torch.no_grad()
    def ours() -> Tensor:
        gate, plan = gate_plan(logits, case.k)
        return fused_experts(setting.x, *weights, gate.weights, gate.indices, plan=plan)

    @torch.no_grad()
    def apart() -> Tensor:
        gate = topk_gate(logits, case.k)
        return fused_experts(setting.x, *weights, gate.weights, gate.indices)

    device = setting.x.device.type
    named = {"kimi_ops": graphed(ours, device), "apart": graphed(apart, device)}
    return named, active * case.expert_bytes


def decode(session: Session) -> None:
    table = session.table("fused_experts (decode)", width=40, peers=("apart",))
    model, weights = "", None
    for case in session.select(decode_cases(session.quick, session.device)):
        if model != case.model:
            weights = None
            model, weights = case.model, make_weights(case, session.device)
        assert weights is not None
        named, moved = decode_functions(case, weights)
        table.compare(case, named, moved, "GB/s", session.bandwidth)


@parametrize("case", experts_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", *PEERS])
def test_fused_experts(benchmark, case, way):  # type: ignore[no-untyped-def]
    named = Setting(case, make_weights(case, "cpu")).functions()
    import pytest

    if way not in named:
        pytest.skip(f"{way} writes more than {MOST_BYTES / 1e9:.0f} GB on the way")
    benchmark.group = f"fused_experts {case}"
    benchmark(named[way])


if __name__ == "__main__":
    main(compare)
