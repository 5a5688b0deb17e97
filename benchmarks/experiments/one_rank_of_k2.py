# SPDX-License-Identifier: MIT
"""One layer of the whole Kimi K2 as one rank of an expert-parallel group has it: forward, backward.

    python -m benchmarks.experiments.one_rank_of_k2 --expert-parallel 32 --tokens 1024

Real widths, in bfloat16: latent attention of 64 heads, a router over all 384 experts, the shared
expert, and 384 / N routed experts. The other ranks are not here. What a balanced all-to-all would
bring is stood in for by the tokens of this rank: each pair (token, expert) goes to one of the
experts that are here, so that they get as many rows as in a group of N ranks that bring as many
tokens each. Nothing is sent; `kimi-ops plan` says what sending would take.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kimi_ops import TopkGate, fused_experts
from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.models.kimi_k2.decoder import DecoderLayer
from kimi_ops.models.kimi_k2.rope import rotary_tables


class Here(NamedTuple):
    """What needs not come from anywhere."""

    y: Tensor

    def wait(self) -> Tensor:
        return self.y


class OneRank:
    """The part of `ExpertRanks` that a layer uses, with the experts of one rank of `world`."""

    def __init__(self, config: KimiK2Config, world: int) -> None:
        self.count = config.n_routed_experts
        if world < 1 or self.count % world:
            raise SystemExit(
                f"--expert-parallel: expected a divisor of {self.count} experts, got {world}"
            )
        self.experts = range(self.count // world)

    def leave(self, x: Tensor, gate: TopkGate) -> tuple[Tensor, TopkGate]:
        return x, gate

    def compute(
        self,
        leaving: tuple[Tensor, TopkGate],
        w_gate_up: Tensor,
        w_down: Tensor,
        activation: str,
        stored: AbstractContextManager[Any],
    ) -> Here:
        x, gate = leaving
        here = gate.indices % len(self.experts)
        options = {"activation": activation}
        with stored:
            return Here(fused_experts(x, w_gate_up, w_down, gate.weights, here, **options))


def build(config: KimiK2Config, world: int, device: str) -> DecoderLayer:
    layer = DecoderLayer(config, 1, OneRank(config, world), device=device, dtype=torch.bfloat16)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.02, generator=generator).add_(float(parameter.dim() == 1))
    return layer


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_rate(device: str) -> float:
    """FLOP/s of a square product of torch, the best of three."""
    a = torch.randn(4096, 4096, device=device).bfloat16()
    a @ a
    return 2.0 * len(a) ** 3 / min(timed(lambda: a @ a) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--expert-parallel", type=int, default=32, help="ranks of the group (32)")
    parser.add_argument("--tokens", type=int, default=1024, help="of this rank (1024)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()

    config = KimiK2Config.k2()
    layer = build(config, options.expert_parallel, options.device)
    weights = sum(parameter.numel() for parameter in layer.parameters())
    x = torch.randn(1, options.tokens, config.hidden_size, device=options.device).bfloat16()
    x.requires_grad_()
    tables = rotary_tables(config, torch.arange(options.tokens, device=options.device))
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = [layer(x, *tables)]

    def backward() -> None:
        layer.zero_grad(set_to_none=True)
        outputs[0].sum().backward()

    timed(forward), timed(backward)  # memory is taken for the first time
    seconds = timed(forward), timed(backward)
    roof = peak_rate(options.device)
    here = layer.mlp.experts.gate_up_proj.shape[0]
    rows = options.tokens * config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    dense = weights - here * expert
    flop = 2.0 * (rows * expert + options.tokens * dense)
    print(f"{here} of {config.n_routed_experts} experts, {weights / 1e9:.3f} G parameters")
    for name, factor, took in zip(("forward", "backward"), (1, 2), seconds, strict=True):
        rate = factor * flop / took
        print(
            f"{name:<9}{took:8.3f} s {rate / 1e12:8.3f} TFLOP/s, {rate / roof:4.0%} of torch's "
            f"largest product {options.tokens / took:8.0f} tokens/s"
        )
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        # Not ru_maxrss, which a process inherits from the one that starts it.
        found = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
        peak = 1024 * int(found[0])
    print(
        f"peak memory {peak / 1e9:.2f} GB, of which weights and gradients {4 * weights / 1e9:.2f}"
    )


if __name__ == "__main__":
    main()
