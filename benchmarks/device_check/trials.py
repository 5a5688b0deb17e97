# SPDX-License-Identifier: MIT
"""Variants of the Hopper products in turns: what KIMI_OPS_TRIAL switches, and torch beside it.

Each variant is a CUDA graph, captured while the variable names it; all of a case take turns, so
that they have the same clock. Their results must be the same bits, but without an epilogue, where
nothing is written, and without promotion. `outside` is the number of
cycles a tile of 128 x 256 in which the tensor cores did nothing: all cycles less 16 (FP8 8) a value
of depth.

    turn, swizzle   random groups: whether a block meets the same row tile always; L2
    lead            depths of 1024 to 7168: whether two consumers that are apart hide the epilogue
    boxes           wgrad: two loads a stage, or six
    prefetch        wgrad into fp32: near the time of torch's add_ of the same bytes?
    order           FP8: whether consumers that take turns keep 768 cycles a block of depth
    store           FP8: C by TMA through one box a warp
    gather, noinc   a layer: tokens permuted, or gathered by the product, by width; and gathered by
                    threads that wait
    epilogue        0: what a tile costs without it, so what hiding it is worth
    promote         0: what FP8 would reach if sums cost nothing: the ceiling of turns

--list says what the cases take on an H100, *estimated*.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kimi_ops
from benchmarks.measure import Functions, graphed, measure

VARIABLE = "KIMI_OPS_TRIAL"
SMS, TILE = 132, 128 * 256
NEVER = "gather=1000000000"
NONE, HELD = "epilogue=0", "promote=0"
OTHER = (NONE, HELD)  # whose results are no results
SAMPLES, SAMPLE_SECONDS, MAKE_SECONDS = 12, 0.02, 1.0  # of a variant, warm-up included; of a case
LAYERS = (
    (7168, 2048, 4096), (7168, 2048, 256), (7168, 768, 4096), (7168, 384, 4096), (2048, 768, 16384),
)  # fmt: skip


def offsets_of(sizes: list[int], device: str) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).int()


def spread(groups: int, mean: int) -> list[int]:
    """Sizes about `mean`, the same in every run."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(groups, generator=generator) + 0.5
    return (weights / weights.sum() * groups * mean).int().tolist()


class Case:
    """`make` gives a function of its own for each variant; the first of these is as shipped."""

    def __init__(
        self,
        name: str,
        variants: list[str],
        make: Callable[[], Callable[[], Tensor]],
        peers: Functions,
        tiles: float = 0.0,
        work: float = 0.0,
    ) -> None:
        self.name, self.variants, self.make, self.peers = name, ["", *variants], make, peers
        self.tiles, self.work = tiles, work  # cycles of the tensor cores a tile

    def seconds(self) -> float:
        """Estimated, on an H100."""
        ways = len(self.variants) + len(self.peers)
        return MAKE_SECONDS + ways * SAMPLES * SAMPLE_SECONDS

    def run(self, device: str) -> list[dict[str, object]]:
        functions: Functions = {}
        first = None
        for variant in self.variants:
            os.environ[VARIABLE] = variant
            function = self.make()
            result = function().clone()
            first = result if first is None else first
            if variant not in OTHER and not torch.equal(result, first):
                raise RuntimeError(f"{self.name}: {variant}: other bits than as shipped")
            functions[variant or "as shipped"] = graphed(function, device)
        os.environ[VARIABLE] = ""
        times = measure(functions | self.peers, device, quick=True)
        rows: list[dict[str, object]] = []
        for name, time in times.items():
            row: dict[str, object] = {"case": self.name, "variant": name, "us": time.median * 1e6}
            row |= {"mhz": time.mhz}
            if time.mhz and self.tiles and name in functions:
                row["outside"] = time.median * time.mhz * 1e6 * SMS / self.tiles - self.work
            rows.append(row)
        return rows


def product(name: str, device: str, sizes: list[int], k: int, n: int, variants: list[str]) -> Case:
    offsets, rows = offsets_of(sizes, device), sum(sizes)
    a = torch.randn(rows, k, device=device).bfloat16()
    b = (torch.randn(len(sizes), n, k, device=device) / k**0.5).bfloat16()
    peers: Functions = {"torch": lambda: F.grouped_mm(a, b.mT, offs=offsets)}
    tiles = sum(s * n / TILE for s in sizes)
    return Case(
        name,
        variants,
        lambda: lambda: kimi_ops.grouped_gemm(a, b.mT, offsets),
        peers,
        tiles,
        16 * k,
    )


def wgrad(name: str, device: str, sizes: list[int], k: int, n: int, into: bool) -> Case:
    offsets, rows = offsets_of(sizes, device), sum(sizes)
    dc = torch.randn(rows, n, device=device).bfloat16()
    a = torch.randn(rows, k, device=device).bfloat16()
    tiles = len(sizes) * n * k / TILE
    work = 16 * rows / len(sizes)
    if not into:
        return Case(
            name,
            ["boxes=0", "lead=1", "lead=2", NONE],
            lambda: lambda: kimi_ops.grouped_gemm_wgrad(dc, a, offsets),
            {"torch": lambda: F.grouped_mm(dc.mT, a, offs=offsets)},
            tiles,
            work,
        )

    def make() -> Callable[[], Tensor]:
        sums = torch.zeros(len(sizes), n, k, device=device)
        return lambda: kimi_ops.grouped_gemm_wgrad(dc, a, offsets, out=sums, accumulate=True)

    other = torch.zeros(len(sizes), n, k, device=device)
    return Case(
        name, ["prefetch=0", "boxes=0"], make, {"add_": lambda: other.add_(1.0)}, tiles, work
    )


def fp8(name: str, device: str, sizes: list[int], k: int, n: int) -> Case:
    offsets, rows = offsets_of(sizes, device), sum(sizes)
    weight = (torch.randn(len(sizes), n, k, device=device) / k**0.5).bfloat16()
    a = torch.randn(rows, k, device=device).bfloat16()
    packed, of_rows = kimi_ops.Fp8BlockWeight.quantize(weight), kimi_ops.Fp8Rows.quantize(a)
    peers: Functions = {"ours in bf16": lambda: kimi_ops.grouped_gemm(a, weight.mT, offsets)}
    tiles = sum(s * n / TILE for s in sizes)
    variants = ["order=1", "order=0", "store=1", "turn=0", "swizzle=8", *OTHER]
    return Case(
        name,
        variants,
        lambda: lambda: kimi_ops.grouped_gemm(of_rows, packed, offsets),
        peers,
        tiles,
        8 * k,
    )


def layer(
    name: str, device: str, experts: int, hidden: int, width: int, tokens: int, fp8: bool = False
) -> Case:
    """In bf16 by every way to its rows; or in FP8, beside bf16 and its parts as passes."""
    up = (torch.randn(experts, 2 * width, hidden, device=device) / hidden**0.5).bfloat16()
    down = (torch.randn(experts, hidden, width, device=device) / width**0.5).bfloat16()
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    routed = kimi_ops.topk_gate(torch.randn(tokens, experts, device=device), 8)

    def run() -> Tensor:
        return kimi_ops.fused_experts(x, up, down, routed.weights, routed.indices)

    if not fp8:
        variants = [NEVER, f"{NEVER},noinc=0", "gather=0,permute=0", NONE]
        return Case(name, variants, lambda: run, {})
    up8, down8 = (kimi_ops.Fp8BlockWeight.quantize(w) for w in (up, down))

    def in_fp8() -> Tensor:
        return kimi_ops.fused_experts(x, up8, down8, routed.weights, routed.indices)

    def passes() -> Tensor:
        plan = kimi_ops.permute_plan(routed.indices, experts)
        rows = kimi_ops.Fp8Rows.quantize(kimi_ops.permute(x, plan))
        gate, up = kimi_ops.grouped_gemm(rows, up8, plan.offsets).chunk(2, 1)
        h = kimi_ops.Fp8Rows.quantize(F.silu(gate) * up)
        c = kimi_ops.grouped_gemm(h, down8, plan.offsets)
        return kimi_ops.unpermute(c, plan, routed.weights)

    peers: Functions = {"ours in bf16": run, "its parts as passes": passes}
    return Case(name, ["order=1", "order=0", NONE], lambda: in_fp8, peers)


def cases(device: str, scale: int) -> Iterator[Case]:
    """Sizes divided by `scale`."""
    k, f, many = 7168 // scale, 2048 // scale, 8192 // scale
    mixed = spread(48, 683 // scale)
    order = ["turn=0", "swizzle=8", "swizzle=32", "turn=0,swizzle=8", "lead=1", "lead=2", "lead=3"]
    order.append(NONE)
    yield product("down, 48 random groups", device, mixed, f, k, order)
    for depth in (1024, 2048, 4096, 7168):
        lead = ["lead=1", "lead=2", "lead=3", NONE]
        yield product(f"4 x 8192, K {depth}", device, [many] * 4, depth // scale, 2 * f, lead)
    rows = 1024 // scale
    yield product("Moonlight up, 64 x 1024", device, [rows] * 64, f, 1408 // scale // 8 * 8, order)
    yield product("down, 48 x 64", device, [64] * 48, f, k, order[:2])
    yield wgrad("wgrad, 4 x 8192", device, [many] * 4, k, 2 * f, False)
    for rows in (64, 1024 // scale):
        yield wgrad(f"wgrad into fp32, 48 x {rows}", device, [rows] * 48, k, 2 * f, True)
    yield fp8("FP8, 4 x 8192", device, [many] * 4, k, 2 * f)
    yield fp8("FP8, 48 random groups", device, mixed, k, 2 * f)
    for tokens in (1, 256, 4096):
        rows = max(1, tokens // scale)
        yield layer(f"FP8 layer, T {tokens}", device, 48 // scale + 8, k, f, rows, fp8=True)
    for hidden, width, tokens in LAYERS:
        name = f"layer, H {hidden}, F {width}, T {tokens}"
        sizes = hidden // scale, width // scale, tokens // scale
        yield layer(name, device, 48 // scale + 8, *sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="the cases and their estimated seconds")
    options = parser.parse_args()
    if options.list:
        every = [(case.name, case.seconds()) for case in cases("cpu", 64)]
        for name, seconds in [*every, ("all", sum(s for _, s in every))]:
            print(f"{name:<32}{seconds:6.1f} s")
        return
    os.environ[VARIABLE] = ""  # before the first launch: now it is read again at each one
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for case in cases(options.device, 1 if options.device == "cuda" else 64):
            for row in case.run(options.device):
                rows.append(row)
                print(
                    "  ".join(
                        f"{v:9.1f}" if isinstance(v, float) else f"{v!s:<26}" for v in row.values()
                    )
                )
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
