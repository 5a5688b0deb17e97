# SPDX-License-Identifier: MIT
"""The experts of a layer in one call, and the same in single steps: plan, permute, two products.

python examples/02_experts.py
"""

import torch
import torch.nn.functional as F

from kimi_ops import fused_experts, grouped_gemm, permute, permute_plan, topk_gate, unpermute

TOKENS, HIDDEN, WIDTH, EXPERTS, K = 256, 128, 64, 16, 4
torch.manual_seed(0)
x = torch.randn(TOKENS, HIDDEN)
w_gate_up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).requires_grad_()
w_down = (torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5).requires_grad_()
gate = topk_gate(torch.randn(TOKENS, EXPERTS), K)

y = fused_experts(x, w_gate_up, w_down, gate.weights, gate.indices)

plan = permute_plan(gate.indices, EXPERTS)  # who stands where: counted, not sorted
rows = permute(x, plan)  # [TOKENS * K, HIDDEN], by expert
gate_rows, up_rows = grouped_gemm(rows, w_gate_up.mT, plan.offsets).chunk(2, dim=1)
down = grouped_gemm(F.silu(gate_rows) * up_rows, w_down.mT, plan.offsets)
steps = unpermute(down, plan, weights=gate.weights)  # the weighted sum, in slot order

torch.testing.assert_close(y, steps, atol=1e-4, rtol=1e-4)
ours = torch.autograd.grad(y.square().sum(), (w_gate_up, w_down))
theirs = torch.autograd.grad(steps.square().sum(), (w_gate_up, w_down))
torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
print(f"one call and six agree to {(y - steps).abs().max():.1e}, and so do their gradients")
