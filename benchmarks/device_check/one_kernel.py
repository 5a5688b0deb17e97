# SPDX-License-Identifier: MIT
"""One call of one op between profiler.start and stop, for ncu: NAME [--device cpu]."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import kimi_ops
from benchmarks.measure import Function


def gate(device: str, tokens: int, experts: int, k: int) -> Function:
    x, bias = torch.randn(tokens, experts, device=device), torch.zeros(experts, device=device)
    return lambda: kimi_ops.topk_gate(x, k, expert_bias=bias)


def permutation(device: str, which: str, scale: int) -> Function:
    tokens, k, experts, hidden = 4096 // scale, 8, 384, 7168 // scale
    ids = torch.rand(tokens, experts, device=device).topk(k, dim=1).indices.int()
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    weights = torch.rand(tokens, k, device=device)
    plan = kimi_ops.permute_plan(ids, experts)
    y = kimi_ops.permute(x, plan)
    ways: dict[str, Function] = {
        "permute": lambda: kimi_ops.permute(x, plan),
        "unpermute": lambda: kimi_ops.unpermute(y, plan, weights),
        "plan": lambda: kimi_ops.permute_plan(ids, experts),
    }
    return ways[which]


def product(device: str, which: str, experts: int, k: int, n: int, rows: int) -> Function:
    def bf16(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    weight = bf16(experts, n, k) / k**0.5
    offsets = (torch.arange(experts) * rows + rows).int().to(device)
    a, dc = bf16(experts * rows, k), bf16(experts * rows, n)
    if which == "forward":
        return lambda: kimi_ops.grouped_gemm(a, weight.mT, offsets)
    if which == "fp8":
        packed, fp8 = kimi_ops.Fp8BlockWeight.quantize(weight), kimi_ops.Fp8Rows.quantize(a)
        return lambda: kimi_ops.grouped_gemm(fp8, packed, offsets)
    if which == "wgrad":
        return lambda: kimi_ops.grouped_gemm_wgrad(dc, a, offsets)
    sums = torch.zeros(experts, n, k, device=device)
    return lambda: kimi_ops.grouped_gemm_wgrad(dc, a, offsets, out=sums, accumulate=True)


def layer(device: str, scale: int) -> Function:
    experts, hidden, width, tokens = 48, 7168 // scale, 2048 // scale, 4096 // scale
    up = torch.randn(experts, 2 * width, hidden, device=device).bfloat16() / hidden**0.5
    down = torch.randn(experts, hidden, width, device=device).bfloat16() / width**0.5
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    routed = kimi_ops.topk_gate(torch.randn(tokens, experts, device=device), 8)
    return lambda: kimi_ops.fused_experts(x, up, down, routed.weights, routed.indices)


def decode(device: str, scale: int) -> Function:
    """A token of K2 behind its router, through 48 of the experts: four launches."""
    experts, hidden, width = 48, 7168 // scale, 2048 // scale
    up = torch.randn(experts, 2 * width, hidden, device=device).bfloat16() / hidden**0.5
    down = torch.randn(experts, hidden, width, device=device).bfloat16() / width**0.5
    x, logits = torch.randn(1, hidden, device=device).bfloat16(), torch.randn(1, experts)
    logits = logits.to(device)

    def layer() -> Tensor:
        routed, plan = kimi_ops.gate_plan(logits, 8)
        return kimi_ops.fused_experts(x, up, down, routed.weights, routed.indices, plan=plan)

    return layer


# name -> (device, divisor of the sizes) -> the call
KERNELS: dict[str, Callable[[str, int], Function]] = {
    "gate": lambda d, s: gate(d, 32768 // s, 384, 8),
    "gate896": lambda d, s: gate(d, 32768 // s, 896, 16),
    "plan": lambda d, s: permutation(d, "plan", s),
    "permute": lambda d, s: permutation(d, "permute", s),
    "unpermute": lambda d, s: permutation(d, "unpermute", s),
    "big": lambda d, s: product(d, "forward", 4, 7168 // s, 4096 // s, 8192 // s),
    "down": lambda d, s: product(d, "forward", 4, 2048 // s, 7168 // s, 8192 // s),
    "few": lambda d, s: product(d, "forward", 48, 7168 // s, 4096 // s, 21),
    "wgrad": lambda d, s: product(d, "wgrad", 4, 7168 // s, 4096 // s, 8192 // s),
    "wgradacc": lambda d, s: product(d, "wgradacc", 48, 7168 // s, 4096 // s, 64),
    "experts": layer,
    "decode": decode,
    "fp8": lambda d, s: product(d, "fp8", 4, 7168 // s, 4096 // s, 8192 // s),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        function = KERNELS[options.kernel](options.device, 1 if options.device == "cuda" else 64)
        function()
        if options.device == "cpu":
            return
        function()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        function()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
