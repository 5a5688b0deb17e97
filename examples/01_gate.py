# SPDX-License-Identifier: MIT
"""A router that stays balanced without an auxiliary loss: the bias of each expert follows its load.

python examples/01_gate.py
"""

import torch

from kimi_ops import topk_gate, update_expert_bias_

TOKENS, EXPERTS, K = 2048, 64, 6
generator = torch.Generator().manual_seed(0)
popular = torch.linspace(1.5, -1.5, EXPERTS)  # tokens like the first experts best
bias = torch.zeros(EXPERTS)  # decides who is chosen, never what a choice weighs

for step in range(401):
    logits = torch.randn(TOKENS, EXPERTS, generator=generator) + popular
    gate = topk_gate(logits, K, expert_bias=bias, scaling_factor=2.5)
    if step % 100 == 0:
        busiest = gate.tokens_per_expert.max() / (TOKENS * K / EXPERTS)
        print(f"step {step:3}: the busiest expert has {busiest:.2f} times the mean")
    update_expert_bias_(bias, gate.tokens_per_expert, rate=0.002)

assert torch.allclose(gate.weights.sum(1), torch.full((TOKENS,), 2.5))
