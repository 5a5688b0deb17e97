# SPDX-License-Identifier: MIT
"""What a call costs where the work is next to nothing: two threads, tiny tensors, beside torch's.

The roof is a target: so many times the peer's median in this run, or microseconds; 100 % and above
meets it. "gradient" are logits that require one; its peer is `x.sigmoid().topk(8)`, renormalised.

    python -m benchmarks.bench_call_overhead [--help]
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.marks import parametrize
from benchmarks.measure import Function, Time
from benchmarks.session import Session, main
from kimi_ops import fused_experts, grouped_gemm, permute, permute_plan, topk_gate, unpermute


@dataclass(frozen=True)
class Call:
    name: str
    ours: Function
    peer: Function | None = None
    times_peer: float = 0.0  # the target: of the peer's time
    microseconds: float = 0.0  # or on its own

    def __str__(self) -> str:
        return self.name

    def functions(self) -> dict[str, Function]:
        return {"kimi_ops": self.ours} | ({"torch": self.peer} if self.peer else {})

    def target(self, times: dict[str, Time]) -> float:
        """Calls a second."""
        if self.peer:
            return 1 / (self.times_peer * times["torch"].median)
        return 1e6 / self.microseconds


def torch_gate(logits: Tensor) -> Tensor:
    weights = logits.sigmoid().topk(8).values
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)


def calls() -> list[Call]:
    torch.manual_seed(0)
    logits, x = torch.randn(4, 384), torch.randn(4, 64, dtype=torch.bfloat16)
    wanted, gradient = torch.randn(4, 384, requires_grad=True), torch.randn(4, 8)
    gate = topk_gate(logits, 8)
    plan = permute_plan(gate.indices, 384)
    rows = permute(x, plan)
    a, b = torch.randn(32, 64).bfloat16(), torch.randn(8, 64, 64).bfloat16()
    offsets = torch.arange(4, 33, 4, dtype=torch.int32)
    gate_up, down = torch.randn(16, 64, 64).bfloat16(), torch.randn(16, 64, 32).bfloat16()
    few = topk_gate(torch.randn(4, 16), 4)

    def backward(weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(weights, wanted, gradient)

    return [
        Call(
            "topk_gate T 4, E 384, K 8", lambda: topk_gate(logits, 8),
            lambda: torch.topk(logits, 8), times_peer=1.0,
        ),
        Call("permute_plan T 4, E 384, K 8", lambda: permute_plan(gate.indices, 384), None, 0, 6),
        Call("permute T 4, K 8, H 64", lambda: permute(x, plan), None, 0, 6),
        Call("unpermute T 4, K 8, H 64", lambda: unpermute(rows, plan, gate.weights), None, 0, 6),
        Call(
            "grouped_gemm R 32, E 8, 64 x 64", lambda: grouped_gemm(a, b, offsets),
            lambda: F.grouped_mm(a, b, offs=offsets), times_peer=0.6,
        ),
        Call(
            "fused_experts T 4, E 16, K 4",
            lambda: fused_experts(x, gate_up, down, few.weights, few.indices), microseconds=25,
        ),
        Call("topk_gate gradient, forward", lambda: topk_gate(wanted, 8), microseconds=20),
        Call(
            "topk_gate gradient, both", lambda: backward(topk_gate(wanted, 8).weights),
            lambda: backward(torch_gate(wanted)), times_peer=1.2,
        ),
    ]  # fmt: skip


def compare(session: Session) -> None:
    if session.device != "cpu":
        print("call_overhead is left out: the host's time behind a GPU is device_check's")
        return
    before = torch.get_num_threads()
    torch.set_num_threads(session.options.threads or 2)
    table = session.table("call_overhead", peers=("torch",))
    for call in session.select(calls()):
        table.compare(call, call.functions(), 1, "Mcall/s", call.target)
    torch.set_num_threads(before)


@parametrize("index", range(8))
@parametrize("way", ["kimi_ops", "torch"])
def test_call_overhead(benchmark, index, way):  # type: ignore[no-untyped-def]
    call = calls()[index]
    benchmark.group = f"call_overhead {call}"
    if way in call.functions():
        benchmark(call.functions()[way])


if __name__ == "__main__":
    main(compare)
