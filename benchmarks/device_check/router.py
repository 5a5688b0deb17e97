# SPDX-License-Identifier: MIT
"""What stands between the router and the experts, in graphs, beside what was predicted for an H100.

Large cases one call at a time behind a flush of the L2, few tokens by twenty. Cases that differ in
one size tell which phase of a kernel takes the time; rows of ties take the gate's exact way. Roofs
of permute: a fill, which only writes, and a copy.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import kimi_ops
from benchmarks.device_check.host_calls import graph_seconds, host_seconds
from benchmarks.measure import Function, graphed, measure

Make = Callable[[str, int], Function]  # (device, divisor of the sizes) -> the call


@dataclass(frozen=True)
class Case:
    make: Make
    predicted_us: float | None = None  # H100; not measured
    few: bool = False  # a call shorter than its launch from the host
    moved: Callable[[int], float] | None = None  # bytes, by the divisor


def gate(
    tokens: int, experts: int, k: int, dtype: torch.dtype = torch.float32, ties: bool = False
) -> Make:
    def make(device: str, scale: int) -> Function:
        rows = max(1, tokens // scale)
        logits = torch.randn(rows, experts, device=device).to(dtype)
        bias = torch.randn(experts, device=device) * (0.0 if ties else 0.1)
        logits = torch.zeros_like(logits) if ties else logits
        return lambda: kimi_ops.topk_gate(logits, k, expert_bias=bias)

    return make


def ids_of(device: str, tokens: int, experts: int, k: int) -> Tensor:
    return torch.rand(tokens, experts, device=device).topk(k, dim=1).indices.int()


def plan(tokens: int, experts: int, k: int) -> Make:
    def make(device: str, scale: int) -> Function:
        ids = ids_of(device, max(1, tokens // scale), experts, k)
        return lambda: kimi_ops.permute_plan(ids, experts)

    return make


def permute(which: str) -> Make:
    def make(device: str, scale: int) -> Function:
        tokens, hidden = 4096 // scale, 7168
        ids = ids_of(device, tokens, 384, 8)
        x = torch.randn(tokens, hidden, device=device).bfloat16()
        made = kimi_ops.permute_plan(ids, 384)
        y = kimi_ops.permute(x, made)
        half = torch.empty_like(y[: len(y) * 9 // 16])  # as many bytes in all as permute moves
        return {
            "permute": lambda: kimi_ops.permute(x, made),
            "fill": y.zero_,
            "copy": lambda: half.copy_(y[: len(half)]),
        }[which]

    return make


ROW = 7168 * 2
CASES = {
    "gate 32768 x 384, 8": Case(gate(32768, 384, 8), 27),
    "gate 32768 x 384, 8, bf16": Case(gate(32768, 384, 8, torch.bfloat16), 27),
    "gate 32768 x 384, 8, ties": Case(gate(32768, 384, 8, ties=True)),
    "gate 32768 x 256, 8": Case(gate(32768, 256, 8), 23),
    "gate 32768 x 896, 16": Case(gate(32768, 896, 16), 50),
    "gate 64 x 384, 8": Case(gate(64, 384, 8), 4.0, few=True),
    "gate 1 x 384, 8": Case(gate(1, 384, 8), 3.4, few=True),
    "plan 1 x 8 of 384": Case(plan(1, 384, 8), 3.2, few=True),
    "plan 512 x 8 of 384": Case(plan(512, 384, 8), few=True),
    "plan 513 x 8 of 384": Case(plan(513, 384, 8), few=True),
    "plan 4096 x 8 of 384": Case(plan(4096, 384, 8), 4.0, few=True),
    "plan 4096 x 8 of 896": Case(plan(4096, 896, 8), few=True),
    "plan 8192 x 16 of 896": Case(plan(8192, 896, 16), 6.0, few=True),
    "plan 8193 x 16 of 896": Case(plan(8193, 896, 16), few=True),
    "permute 4096 x 8 x 7168": Case(permute("permute"), 186, moved=lambda s: 4096 // s * 9 * ROW),
    "permute: fill": Case(permute("fill"), moved=lambda s: 4096 // s * 8 * ROW),
    "permute: copy": Case(permute("copy"), moved=lambda s: 4096 // s * 8 * 9 // 16 * 2 * ROW),
}


def candidates(tokens: int, experts: int, k: int) -> dict[str, float]:
    """How many experts of a row reach the gate's bound (csrc/topk_gate/choose.cuh), without the
    margin of the estimates; the share of rows in which they are too many."""
    choice = torch.randn(tokens, experts).sigmoid() + 0.1 * torch.randn(experts)
    lanes = choice.view(tokens, -1, 32, 4).transpose(1, 2).flatten(2)
    at_hand = lanes.topk(1 if k <= 8 else 2, dim=2).values.flatten(1)
    bound = at_hand.topk(k, dim=1).values[:, -1:]
    found = (choice >= bound).sum(1)
    crowded = (lanes >= bound[:, None]).sum(2).amax(1) > 7
    return {
        "mean": float(found.float().mean()),
        "most": float(found.max()),
        "exact": float(((found > 32) | crowded).float().mean()),
    }


def seconds(case: Case, device: str, scale: int) -> float:
    function = case.make(device, scale)
    if device == "cpu":
        return host_seconds(function, device)
    if case.few:
        return graph_seconds(function)
    return measure({"": graphed(function, device)}, device, quick=True)[""].median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    for shape in ((4096, 384, 8), (4096, 896, 16)):
        row = found["candidates of {} x {}, {}".format(*shape)] = candidates(*shape)
        print(f"{shape}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
    scale = 1 if options.device == "cuda" else 256
    with torch.no_grad():
        for name, case in CASES.items():
            taken = seconds(case, options.device, scale)
            row = found[name] = {"us": taken * 1e6}
            if case.predicted_us is not None:
                row["predicted_us"] = case.predicted_us
            if case.moved is not None:
                row["gb_per_s"] = case.moved(scale) / taken * 1e-9
            shown = "  ".join(f"{k} {v:.2f}" for k, v in row.items())
            print(f"{name:<28}{shown}", flush=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
