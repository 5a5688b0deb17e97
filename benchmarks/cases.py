# SPDX-License-Identifier: MIT
"""The shapes that are measured, and the command line that all benchmarks share."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class GateCase:
    tokens: int
    experts: int
    k: int
    kind: str = "random"  # | "ties" (all logits 0) | "groups" (8, of which 4 are kept)

    def __str__(self) -> str:
        kind = "" if self.kind == "random" else f", {self.kind}"
        return f"T {self.tokens}, E {self.experts}, K {self.k}{kind}"


def gate_cases(quick: bool) -> list[GateCase]:
    """Moonlight (64 experts), DeepSeek-V3 (256), Kimi K2 (384) and Kimi K3 (896) routers."""
    models = [(384, 8)] if quick else [(64, 6), (256, 8), (384, 8), (896, 16)]
    tokens = [1, 64, 4096] if quick else [1, 64, 512, 4096, 32768]
    hard = [GateCase(4096, 384, 8, "ties"), GateCase(4096, 256, 8, "groups")]
    return [GateCase(t, e, k) for e, k in models for t in tokens] + hard


@dataclass(frozen=True)
class PermuteCase:
    tokens: int
    k: int
    experts: int
    hidden: int
    skew: str = "balanced"

    def __str__(self) -> str:
        shape = f"T {self.tokens}, K {self.k}, E {self.experts}, H {self.hidden}"
        return shape if self.skew == "balanced" else f"{shape}, {self.skew}"


def permute_cases(quick: bool) -> list[PermuteCase]:
    """Kimi K2 from decode (few tokens) to training, Moonlight, Kimi K3."""
    if quick:
        return [PermuteCase(64, 8, 384, 7168), PermuteCase(1024, 8, 384, 7168)]
    return [
        PermuteCase(1, 8, 384, 7168),
        PermuteCase(64, 8, 384, 7168),
        PermuteCase(512, 8, 384, 7168),
        PermuteCase(4096, 8, 384, 7168),
        PermuteCase(4096, 8, 384, 7168, "hot"),
        PermuteCase(16384, 6, 64, 2048),
        PermuteCase(8192, 16, 896, 3584),
    ]


@dataclass(frozen=True)
class BalanceCase:
    op: str  # "balance loss" | "z loss" | "bias rule"
    tokens: int
    experts: int
    k: int
    sequences: int
    dtype: str = "float32"
    backward: bool = True

    def __str__(self) -> str:
        if self.op == "bias rule":
            return f"{self.op}, E {self.experts}"
        kind = "" if self.dtype == "float32" else f" {self.dtype}"
        passes = "fwd+bwd" if self.backward else "fwd"
        return f"{self.op} {passes}, T {self.tokens}, E {self.experts}{kind}"


def balance_cases(quick: bool) -> list[BalanceCase]:
    """Routers of topk_gate's models, in sequences of at most 4096 tokens."""
    cases = []
    for op in ("balance loss", "z loss"):
        for experts, k in [(384, 8)] if quick else [(64, 6), (384, 8), (896, 16)]:
            for tokens in [4096] if quick else [64, 4096, 32768]:
                for backward in (False, True):
                    sequences = max(1, tokens // 4096)
                    cases.append(BalanceCase(op, tokens, experts, k, sequences, backward=backward))
        cases.append(BalanceCase(op, 4096, 384, 8, 1, "bfloat16"))
    return [*cases, BalanceCase("bias rule", 0, 384, 8, 1)]


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="few cases, short samples")
    parser.add_argument("--json", metavar="FILE", help="write the rows and the machine as JSON")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart (svg, png)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser
