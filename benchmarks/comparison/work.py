# SPDX-License-Identifier: MIT
"""The work that libraries are compared in: operands, this library's way, and those of torch.

Every way gives one tensor in the end (`Way.result`), which is compared with ours before anything is
timed: a library that computes something else has no time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_grouped_gemm import make_weight
from benchmarks.bench_newton_schulz import quintic, torch_muon
from benchmarks.bench_permute import make_ids, torch_plan, torch_unpermute
from benchmarks.cases import GEMM_SHAPES, ExpertsCase, GemmCase, MatrixCase, PermuteCase
from benchmarks.measure import roof_rate
from benchmarks.session import Session
from kimi_ops import (
    fused_experts,
    grouped_gemm,
    newton_schulz,
    ns_flops,
    permute,
    permute_plan,
    topk_gate,
    unpermute,
)


def unchanged(result: Any) -> Tensor:
    return result


@dataclass
class Way:
    """A call that is timed, and what its result is as one tensor, which is not."""

    call: Callable[[], Any]
    result: Callable[[Any], Tensor] = unchanged


Ways = dict[str, Way]


@dataclass
class Router:
    """Softmax, the k best, their weights to sum 1."""

    logits: Tensor  # [T, E] fp32
    k: int

    tolerance, unit = 1e-5, "GB/s"

    @classmethod
    def of(cls, tokens: int, experts: int, k: int, device: str) -> "Router":
        return cls(torch.randn(tokens, experts, device=device), k)

    def __str__(self) -> str:
        return f"T {self.logits.shape[0]}, E {self.logits.shape[1]}, K {self.k}"

    def work(self) -> float:
        return 4 * self.logits.numel() + 8 * self.logits.shape[0] * self.k

    def roof(self, session: Session) -> float:
        return session.bandwidth

    def dense(self, weights: Tensor, ids: Tensor) -> Tensor:
        """[T, E], the form in which routers agree."""
        return torch.zeros_like(self.logits).scatter_(1, ids.long(), weights.float())

    def ways(self) -> Ways:
        def torch_gate() -> tuple[Tensor, Tensor, Tensor]:
            scores = self.logits.softmax(-1)
            weights, ids = scores.topk(self.k, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
            return weights, ids, torch.bincount(ids.flatten(), minlength=scores.shape[1])

        return {
            "kimi_ops": Way(
                lambda: topk_gate(self.logits, self.k, score_function="softmax"),
                lambda gate: self.dense(gate.weights, gate.indices),
            ),
            "torch": Way(torch_gate, lambda found: self.dense(*found[:2])),
        }


@dataclass
class Rows:
    """Tokens to their experts' rows and back, the plan made anew."""

    x: Tensor  # [T, H] bf16
    ids: Tensor  # [T, K] int32
    weights: Tensor  # [T, K] fp32
    experts: int

    tolerance, unit = 2e-2, "GB/s"

    @classmethod
    def of(cls, tokens: int, k: int, experts: int, hidden: int, device: str) -> "Rows":
        ids = make_ids(PermuteCase(tokens, k, experts, hidden)).to(device)
        x = torch.randn(tokens, hidden, device=device).bfloat16()
        weights = torch.rand(tokens, k, device=device).softmax(-1)
        return cls(x, ids, weights, experts)

    def __str__(self) -> str:
        tokens, k = self.ids.shape
        return f"T {tokens}, K {k}, E {self.experts}, H {self.x.shape[1]}"

    def work(self) -> float:
        tokens, k = self.ids.shape
        return 2 * self.x.shape[1] * tokens * (2 + 2 * k)

    def roof(self, session: Session) -> float:
        return session.bandwidth

    def ways(self) -> Ways:
        def ours() -> Tensor:
            plan = permute_plan(self.ids, self.experts)
            return unpermute(permute(self.x, plan), plan, weights=self.weights)

        def theirs() -> Tensor:
            order, _ = torch_plan(self.ids, self.experts)
            rows = self.x.index_select(0, order // self.ids.shape[1])
            row_map = torch.empty_like(order)
            row_map[order] = torch.arange(len(order), device=order.device)
            return torch_unpermute(rows, row_map.view_as(self.ids), self.weights)

        return {"kimi_ops": Way(ours), "torch": Way(theirs)}


@dataclass
class Products:
    """The rows of each expert times its matrix."""

    a: Tensor  # [R, K] bf16
    weight: Tensor  # [E, N, K] bf16
    sizes: Tensor  # [E] int64, on the host
    name: str

    tolerance, unit = 2e-2, "TFLOP/s"

    @classmethod
    def of(cls, shape: str, experts: int, rows: int, device: str) -> "Products":
        case = GemmCase(shape, experts, rows)
        a = torch.randn(case.total, GEMM_SHAPES[shape][0], device=device).bfloat16()
        return cls(a, make_weight(case, device), torch.full((experts,), rows), str(case))

    def __str__(self) -> str:
        return self.name

    def work(self) -> float:
        return 2.0 * len(self.a) * self.weight.shape[1] * self.weight.shape[2]

    def roof(self, session: Session) -> float:
        rows, (_, n, k) = len(self.a), self.weight.shape
        moved = 2 * (self.weight.numel() + rows * (n + k))
        return roof_rate(self.work(), moved, session.peak(torch.bfloat16), session.bandwidth)

    def ways(self) -> Ways:
        offsets = self.sizes.cumsum(0).int().to(self.a.device)
        ends = [0, *offsets.tolist()]

        def loop() -> Tensor:
            groups = zip(ends, ends[1:], self.weight, strict=False)
            return torch.cat([self.a[begin:end] @ w.mT for begin, end, w in groups])

        return {
            "kimi_ops": Way(lambda: grouped_gemm(self.a, self.weight.mT, offsets)),
            "torch grouped_mm": Way(lambda: F.grouped_mm(self.a, self.weight.mT, offs=offsets)),
            "torch loop": Way(loop),
        }


@dataclass
class Experts:
    """The routed experts of a layer: gather, gate and up, SiLU, down, weighted sum."""

    case: ExpertsCase
    x: Tensor  # [T, H] bf16
    w_gate_up: Tensor  # [E, 2F, H] bf16
    w_down: Tensor  # [E, H, F] bf16
    weights: Tensor  # [T, K] fp32
    ids: Tensor  # [T, K] int32

    tolerance, unit = 3e-2, "TFLOP/s"

    @classmethod
    def of(cls, experts: int, hidden: int, width: int, tokens: int, device: str) -> "Experts":
        from benchmarks.bench_fused_experts import make_weights

        name = f"E {experts}, H {hidden}, F {width}"
        case = ExpertsCase(name, experts, hidden, width, tokens, k=min(8, experts))
        gate = topk_gate(torch.randn(tokens, experts), case.k)
        x = torch.randn(tokens, hidden, device=device).bfloat16()
        weights = gate.weights.to(device), gate.indices.to(device)
        return cls(case, x, *make_weights(case, device), *weights)

    def __str__(self) -> str:
        return str(self.case)

    def work(self) -> float:
        return self.case.flops

    def roof(self, session: Session) -> float:
        moved = len(self.ids.unique()) * self.case.expert_bytes + 4 * self.x.numel()
        return roof_rate(self.work(), moved, session.peak(torch.bfloat16), session.bandwidth)

    def ways(self) -> Ways:
        def grouped() -> Tensor:
            order, ends = torch_plan(self.ids, len(self.w_down))
            token, ends = order // self.ids.shape[1], ends.int()
            both = F.grouped_mm(self.x[token], self.w_gate_up.mT, offs=ends)
            gate, up = both.chunk(2, dim=-1)
            down = F.grouped_mm(F.silu(gate) * up, self.w_down.mT, offs=ends)
            down = down * self.weights.flatten()[order, None]
            return torch.zeros_like(self.x).index_add_(0, token, down.to(self.x.dtype))

        operands = (self.x, self.w_gate_up, self.w_down, self.weights, self.ids)
        return {
            "kimi_ops": Way(lambda: fused_experts(*operands)),
            "torch grouped_mm": Way(grouped),
        }


@dataclass
class Matrices:
    """Five steps of Muon's quintic on a stack of matrices."""

    case: MatrixCase
    g: Tensor  # [count, m, n] fp32

    tolerance, unit = 0.1, "TFLOP/s"

    @classmethod
    def of(cls, rows: int, columns: int, count: int, device: str) -> "Matrices":
        case = MatrixCase(rows, columns, count)
        return cls(case, torch.randn(count, rows, columns, device=device))

    def __str__(self) -> str:
        return str(self.case)

    def work(self) -> float:
        return ns_flops(tuple(self.g.shape), 5, "standard")

    def roof(self, session: Session) -> float:
        return session.peak(torch.bfloat16)

    def ways(self) -> Ways:
        return {
            "kimi_ops": Way(lambda: newton_schulz(self.g)),
            "torch.optim.Muon": Way(lambda: torch_muon(self.g), torch.stack),
            "torch": Way(lambda: quintic(self.g)),
        }


Work = Router | Rows | Products | Experts | Matrices


def all_work(quick: bool, device: str) -> dict[str, list[Callable[[], Work]]]:
    """What is compared, by op; each makes its operands when it is its turn."""
    large = device == "cuda"
    tokens = [64, 4096] if quick else [1, 64, 512, 4096, 32768]
    moved = ([1024] if quick else [64, 1024, 4096]) if not large else [64, 4096]
    rows = [128, 1024] if large else ([64] if quick else [4, 64, 256])
    batch = [16, 4096] if large else ([16, 256] if quick else [1, 16, 256, 2048])
    matrices = [(2048, 7168, 8)] if large else [(576, 1536, 1), (192, 1536, 8)]
    if not quick and not large:
        matrices.append((2048, 7168, 1))
    return {
        "topk_gate": [lambda t=t: Router.of(t, 384, 8, device) for t in tokens],
        "permute": [lambda t=t: Rows.of(t, 8, 384, 7168, device) for t in moved],
        "grouped_gemm": [lambda r=r: Products.of("Moonlight", 64, r, device) for r in rows],
        "fused_experts": [lambda t=t: Experts.of(64, 2048, 768, t, device) for t in batch],
        "newton_schulz": [lambda m=m: Matrices.of(*m, device) for m in matrices],
    }
