# SPDX-License-Identifier: MIT
"""permute_plan, permute, unpermute against torch: argsort + bincount, index_select, weighted sum.

Copies allocate their output, on both sides, as a call in a model does: the page faults of fresh
memory count. "memcpy" clones the output. Roof of the copies: bytes read and written at the rate of
that memcpy; of the plan: its bytes at the read bandwidth.

    python -m benchmarks.bench_permute [--help]
"""

import torch
from torch import Tensor

from benchmarks.cases import PermuteCase, permute_cases
from benchmarks.marks import parametrize
from benchmarks.measure import Functions, Time
from benchmarks.session import Session, main
from kimi_ops import permute, permute_plan, unpermute


def make_ids(case: PermuteCase) -> Tensor:
    """Distinct experts a token; hot: a fifth of the tokens share theirs; balanced: uniform."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(case.tokens, case.experts, generator=generator)
    if case.skew == "hot":
        noise[: max(1, case.tokens // 5), : case.k] += 1
    return noise.topk(case.k, dim=1).indices.int()


def torch_plan(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    flat = ids.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts).cumsum(0)


def torch_unpermute(y: Tensor, row_map: Tensor, weights: Tensor) -> Tensor:
    rows = y.index_select(0, row_map.flatten()).view(*row_map.shape, -1)
    return (rows * weights[..., None].to(y.dtype)).sum(1)


class Setting:
    """One case's tensors and the ways that are compared."""

    def __init__(self, case: PermuteCase, device: str, compiled: bool) -> None:
        self.case, self.compiled = case, compiled
        self.ids = make_ids(case).to(device)
        self.x = torch.randn(case.tokens, case.hidden).bfloat16().to(device)
        self.weights = torch.rand(case.tokens, case.k).to(device)
        self.plan = permute_plan(self.ids, case.experts)
        self.y = permute(self.x, self.plan)

    def plans(self) -> Functions:
        ids, experts = self.ids, self.case.experts
        return {
            "kimi_ops": lambda: permute_plan(ids, experts),
            "torch": lambda: torch_plan(ids, experts),
        }

    def copies(self) -> Functions:
        token = self.plan.source.long() // self.case.k
        return {
            "kimi_ops": lambda: permute(self.x, self.plan),
            "torch": lambda: torch.index_select(self.x, 0, token),
            "memcpy": lambda: self.y.clone(),
        }

    def sums(self) -> Functions:
        row_map = self.plan.row_map.long()
        named: Functions = {
            "kimi_ops": lambda: unpermute(self.y, self.plan, self.weights),
            "torch": lambda: torch_unpermute(self.y, row_map, self.weights),
        }
        if self.compiled:
            function = torch.compile(torch_unpermute, dynamic=False)
            named["torch.compile"] = lambda: function(self.y, row_map, self.weights)
        return named


def compare(session: Session) -> None:
    for part in ("plans", "copies", "sums"):
        table = session.table(f"permute ({part})")
        for case in session.select(permute_cases(session.quick, session.device)):
            pairs, row_bytes = case.tokens * case.k, 2 * case.hidden
            moved = 12 * pairs if part == "plans" else (case.tokens + pairs) * row_bytes

            def roof(times: dict[str, Time], copied: int = 2 * pairs * row_bytes) -> float:
                return copied / times["memcpy"].median

            with torch.no_grad():
                named = getattr(Setting(case, session.device, session.compiled), part)()
                limit = roof if part == "copies" else session.bandwidth
                table.compare(case, named, moved, "GB/s", limit)


@parametrize("case", permute_cases(quick=True), ids=str)
@parametrize("part", ["plans", "copies", "sums"])
@parametrize("way", ["kimi_ops", "torch"])
def test_permute(benchmark, case, part, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"permute {part} {case}"
    with torch.no_grad():
        benchmark(getattr(Setting(case, "cpu", compiled=False), part)()[way])


if __name__ == "__main__":
    main(compare)
