# SPDX-License-Identifier: MIT
"""Experts that stay as a checkpoint stores them: FP8 blocks or INT4 groups.

python examples/04_quantized.py
"""

import torch

from kimi_ops import Fp8BlockWeight, Int4GroupWeight, fused_experts, topk_gate

TOKENS, HIDDEN, WIDTH, EXPERTS = 8, 256, 128, 8
torch.manual_seed(0)
x = torch.randn(TOKENS, HIDDEN).bfloat16()
w_gate_up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).bfloat16()
w_down = (torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5).bfloat16()
gate = topk_gate(torch.randn(TOKENS, EXPERTS), k=2)

exact = fused_experts(x, w_gate_up, w_down, gate.weights, gate.indices).float()
for form, most in ((Fp8BlockWeight, 0.06), (Int4GroupWeight, 0.2)):
    stored = form.quantize(w_gate_up), form.quantize(w_down)
    y = fused_experts(x, *stored, gate.weights, gate.indices).float()
    error = float((y - exact).norm() / exact.norm())
    print(f"{form.__name__:<16} relative error {error:.3f}")
    assert error < most
