# SPDX-License-Identifier: MIT
"""What a wrong call says, and what serves the right ones on this machine.

python examples/10_errors.py
"""

import torch

import kimi_ops

x, ids = torch.randn(4, 8), torch.tensor([[0, 1]] * 4, dtype=torch.int32)
weights = torch.rand(4, 2)
wrong = {
    "too many experts chosen": lambda: kimi_ops.topk_gate(torch.randn(4, 8), k=9),
    "an id that no expert has": lambda: kimi_ops.permute_plan(ids + 5, num_experts=4),
    "matrices of another width": lambda: kimi_ops.fused_experts(
        x, torch.randn(2, 6, 7), torch.randn(2, 8, 3), weights, ids
    ),
}
for what, call in wrong.items():
    try:
        call()
    except (TypeError, ValueError) as error:
        print(f"{what}\n    {type(error).__name__}: {error}")
    else:
        raise AssertionError(f"{what}: nothing was raised")

found = kimi_ops.info()
print(f"{found['cpu']['processor']}, {found['cpu']['isa']}")
for op, engines in found["engines"].items():
    print(f"    {op:<16}{engines['cpu']}")
