# SPDX-License-Identifier: MIT
"""A mixture-of-experts block as one graph of torch.compile, for any number of tokens.

python examples/03_compile.py
"""

import torch
from torch import Tensor, nn

from kimi_ops import fused_experts, topk_gate


class Block(nn.Module):
    def __init__(self, hidden: int, width: int, experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w_gate_up = nn.Parameter(torch.randn(experts, 2 * width, hidden) / hidden**0.5)
        self.w_down = nn.Parameter(torch.randn(experts, hidden, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate = topk_gate(self.router(x), self.k)
        return x + fused_experts(x, self.w_gate_up, self.w_down, gate.weights, gate.indices)


torch.manual_seed(0)
block = Block(hidden=64, width=32, experts=8, k=2)
compiled = torch.compile(block, fullgraph=True, dynamic=True)  # a break would be an error
for tokens in (3, 50):
    x = torch.randn(tokens, 64)
    torch.testing.assert_close(compiled(x), block(x), atol=1e-5, rtol=1e-5)
compiled(torch.randn(20, 64)).square().mean().backward()
assert block.router.weight.grad is not None
print("one graph for 3, 20 and 50 tokens, forward and backward")
