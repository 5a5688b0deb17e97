# SPDX-License-Identifier: MIT
"""Biases of the forms that are composed of products, against the twin in float64."""

import pytest
import torch

from kimi_ops import fused_experts


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("stacks", [1, 2])
def test_biases_of_composed_forms(stacks, first):
    torch.manual_seed(0)
    x, up, down = torch.randn(9, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    weights, ids = torch.rand(9, 2), torch.randint(-1, 3, (9, 2)).int()
    biases = {"b_gate_up": torch.randn(3, 12), "b_down": torch.randn(3, 8)}

    def run(dtype):
        both = up.to(dtype)
        both = both if stacks == 1 else tuple(w.clone() for w in both.chunk(2, dim=1))
        given = {name: bias.to(dtype) for name, bias in biases.items()}
        numbers = x.to(dtype), both, down.to(dtype), weights.to(dtype), ids
        return fused_experts(*numbers, **given, weights_first=first)

    torch.testing.assert_close(
        run(torch.float32).double(), run(torch.float64), rtol=1e-5, atol=1e-5
    )
