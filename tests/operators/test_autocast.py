# SPDX-License-Identifier: MIT
"""What ops do inside of torch.autocast: products are cast, scores and losses are not, rows stay."""

import pytest
import torch

from tests.operators.test_derivatives import OPS

CAST = {"grouped_gemm", "quantised", "fused_experts", "fused_experts recompute",
        "fused_experts stored"}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_results_under_autocast(name, dtype):
    function, inputs, _ = OPS[name]
    score = name in ("topk_gate", "topk_gate given", "gate_plan", "z_loss", "sequence_balance_loss")
    weights = {"permute_weights": 0, "unpermute": 1}.get(name)
    weights = len(inputs) - 1 if name.startswith("fused") else weights  # fp32 in every call
    leaves = [
        x.to(dtype if n != weights else torch.float32).requires_grad_()
        for n, x in enumerate(inputs)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*leaves)
    expected = torch.float32 if score or name == "permute_weights" else dtype
    assert y.dtype == (torch.bfloat16 if name in CAST else expected)
    with torch.autocast("cpu", enabled=False):
        plain = function(*[x.bfloat16() if name in CAST and n != weights else x
                           for n, x in enumerate(leaves)])  # fmt: skip
    assert torch.equal(y, plain)
    gradients = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
