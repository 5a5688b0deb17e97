# SPDX-License-Identifier: MIT
"""What a call of every public op costs where the work is next to nothing: two threads, tiny inputs.

The roof is a target: so many times the peer's median in this run, or microseconds; 100 % and above
meets it. "gradient" are logits that require one; its peer is `x.sigmoid().topk(8)`, renormalised.

    python -m benchmarks.bench_call_overhead [--help]
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kimi_ops
from benchmarks.marks import parametrize
from benchmarks.measure import Function, Time
from benchmarks.session import Session, main
from kimi_ops import fused_experts, grouped_gemm, permute, permute_plan, topk_gate, unpermute

NATIVE, COMPOSED = 10.0, 100.0  # targets in us: one native call, a handful of torch's beside it


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


def every_op() -> list[Call]:
    """The other public ops, forward, on the smallest layer: a native call, or a few."""
    torch.manual_seed(0)
    logits, x = torch.randn(4, 16), torch.randn(4, 64, dtype=torch.bfloat16)
    gate = kimi_ops.topk_gate(logits, 4)
    plan = kimi_ops.permute_plan(gate.indices, 16)
    rows = kimi_ops.permute(x, plan)
    matrix, symmetric = torch.randn(32, 48).bfloat16(), torch.eye(32).bfloat16()
    histogram, bounds = torch.zeros(16, 8, dtype=torch.int32), torch.tensor([-1.0, 1.0])
    sizes, order = torch.tensor([4, 0, 12]).int(), torch.tensor([2, 0, 1]).int()
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    weight, bias = torch.randn(4, 16), torch.zeros(16)
    parameter = torch.nn.Parameter(torch.randn(32, 48))
    parameter.grad = torch.randn(32, 48)
    optimizer = kimi_ops.MuonClip([parameter], lr=1e-6)
    placement = kimi_ops.eplb(torch.ones(1, 16), 16, 1, 1, 2)
    one, more, step = NATIVE, COMPOSED, 300.0
    timed: list[tuple[str, Function, float]] = [
        ("gate_plan", lambda: kimi_ops.gate_plan(logits, 4), one),
        ("dense_gate", lambda: kimi_ops.dense_gate(logits, 4), more),
        ("normalized_scores", lambda: kimi_ops.normalized_scores(logits), more),
        ("drop_to_capacity", lambda: kimi_ops.drop_to_capacity(*gate[:2], 16, 1), more),
        (
            "update_expert_bias_",
            lambda: kimi_ops.update_expert_bias_(bias, gate.tokens_per_expert, 1e-3), one,
        ),
        ("sequence_counts", lambda: kimi_ops.sequence_counts(gate.indices, 16), one),
        (
            "sequence_balance_loss",
            lambda: kimi_ops.sequence_balance_loss(logits, gate.indices), 2 * one,
        ),
        ("z_loss", lambda: kimi_ops.z_loss(logits), one),
        (
            "quantile_histogram_",
            lambda: kimi_ops.quantile_histogram_(histogram, logits, 4, bounds=bounds), 2 * one,
        ),
        ("quantile_bias", lambda: kimi_ops.quantile_bias(histogram, 4, bounds=bounds), more),
        ("replica_ids", lambda: kimi_ops.replica_ids(gate.indices, placement), more),
        ("permute_weights", lambda: kimi_ops.permute_weights(gate.weights, plan), one),
        ("sort_chunks", lambda: kimi_ops.sort_chunks(rows, sizes, order), one),
        ("grouped_gemm_wgrad", lambda: kimi_ops.grouped_gemm_wgrad(rows, rows, plan.offsets), one),
        ("Fp8Rows.quantize", lambda: kimi_ops.Fp8Rows.quantize(x), one),
        ("newton_schulz", lambda: kimi_ops.newton_schulz(matrix), 5 * one),
        ("symmetric_matmul", lambda: kimi_ops.symmetric_matmul(symmetric, symmetric), 2 * one),
        ("syrk", lambda: kimi_ops.syrk(matrix), 2 * one),
        ("attention_max_logits", lambda: kimi_ops.attention_max_logits(q, k, 0.25), one),
        (
            "qk_clip_",
            lambda: kimi_ops.qk_clip_(
                torch.ones(2), q_weight=weight, k_weight=weight, layout="mha", head_dim=2
            ),
            more,
        ),
        ("MuonClip.step", optimizer.step, step),
    ]  # fmt: skip
    return [Call(name, function, microseconds=most) for name, function, most in timed]


def compare(session: Session) -> None:
    if session.device != "cpu":
        print("call_overhead is left out: the host's time behind a GPU is device_check's")
        return
    before = torch.get_num_threads()
    torch.set_num_threads(session.options.threads or 2)
    table = session.table("call_overhead", peers=("torch",))
    for call in session.select([*calls(), *every_op()]):
        table.compare(call, call.functions(), 1, "Mcall/s", call.target)
    torch.set_num_threads(before)


@parametrize("index", range(len(calls()) + len(every_op())))
@parametrize("way", ["kimi_ops", "torch"])
def test_call_overhead(benchmark, index, way):  # type: ignore[no-untyped-def]
    call = [*calls(), *every_op()][index]
    benchmark.group = f"call_overhead {call}"
    if way in call.functions():
        benchmark(call.functions()[way])


if __name__ == "__main__":
    main(compare)
