# SPDX-License-Identifier: MIT
"""topk_gate against the same work in torch: sigmoid, bias, topk, gather, normalise, bincount.

Roof: bytes read (logits) and written (ids, weights) at the read bandwidth of this run. On a CPU the
arithmetic of the scores is the limit, so the percentage says how far from memory-bound it is.

    python -m benchmarks.bench_topk_gate [--help]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import GateCase, gate_cases
from benchmarks.marks import parametrize
from benchmarks.session import Session, main
from kimi_ops import topk_gate

SCALE = 2.827


def torch_gate(
    logits: Tensor, bias: Tensor, k: int, groups: int = 1, topk_groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    scores = logits.float().sigmoid()
    choice = scores + bias
    if groups > 1:
        members = choice.unflatten(1, (groups, -1))
        best = members.topk(2, dim=-1).values.sum(dim=-1).topk(topk_groups, dim=-1).indices
        kept = torch.zeros_like(members[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = members.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = choice.topk(k, dim=-1).indices
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * SCALE
    return weights, ids, torch.bincount(ids.flatten(), minlength=logits.shape[1])


def functions(case: GateCase, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.tokens, case.experts, generator=generator)
    logits = logits.to(device, getattr(torch, case.dtype))
    bias = (torch.randn(case.experts, generator=generator) * 0.1).to(device)
    if case.kind == "ties":
        logits.zero_()
        bias.zero_()
    groups = (8, 4) if case.kind == "groups" else (1, 1)
    named: dict[str, Callable[[], object]] = {
        "kimi_ops": lambda: topk_gate(
            logits, case.k, expert_bias=bias, scaling_factor=SCALE,
            num_groups=groups[0], topk_groups=groups[1],
        ),
        "torch": lambda: torch_gate(logits, bias, case.k, *groups),
    }  # fmt: skip
    if compiled:
        function = torch.compile(torch_gate, dynamic=case.tokens > 1)
        named["torch.compile"] = lambda: function(logits, bias, case.k, *groups)
    return named


def compare(session: Session) -> None:
    table = session.table("topk_gate")
    for case in session.select(gate_cases(session.quick, session.device)):
        size = 4 if case.dtype == "float32" else 2
        moved = case.tokens * (size * case.experts + 8 * case.k)
        with torch.no_grad():
            named = functions(case, session.device, session.compiled)
            table.compare(case, named, moved, "GB/s", session.bandwidth)


@parametrize("case", gate_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", "torch"])
def test_topk_gate(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"topk_gate {case}"
    with torch.no_grad():
        benchmark(functions(case, "cpu", compiled=False)[way])


if __name__ == "__main__":
    main(compare)
