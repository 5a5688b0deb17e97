# SPDX-License-Identifier: MIT
"""torchtitan's grouped experts by its names, against the feed-forward of each expert."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.compat import torchtitan


def restated(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor, sizes: list[int]) -> Tensor:
    *groups, tail = x.split([*sizes, len(x) - sum(sizes)])
    parts = zip(groups, w1, w2, w3, strict=True)
    y = [F.linear(F.silu(rows @ a.T) * (rows @ c.T), b) for rows, a, b, c in parts]
    return torch.cat([*y, torch.zeros_like(tail)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("sizes", [[3, 0, 8, 5], [0, 0], [1]], ids=str)
def test_experts_and_their_gradients(sizes, tail, dtype):
    torch.manual_seed(0)
    experts, hidden, inner = len(sizes), 16, 24
    shapes = (experts, inner, hidden), (experts, hidden, inner), (experts, inner, hidden)
    weights = [(torch.randn(shape) / 4).to(dtype).requires_grad_() for shape in shapes]
    x = torch.randn(sum(sizes) + tail, hidden).to(dtype).requires_grad_()
    leaves = [*weights, x]
    y = torchtitan.run_experts_grouped_mm(*leaves, torch.tensor(sizes))
    wide = [t.detach().bfloat16().double().requires_grad_() for t in leaves]
    want = restated(*wide, sizes)
    assert y.dtype == dtype and not y[sum(sizes) :].any()
    dy = torch.randn(y.shape).bfloat16()
    got = [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]
    exact = [want, *torch.autograd.grad(want, wide, dy.double())]
    for mine, truth in zip(got, exact, strict=True):
        assert (mine - truth).norm() <= 1.5e-2 * truth.norm()


def test_the_seam_of_the_module():
    class GroupedExperts:
        def forward(self, rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
            return self._grouped_mm(A=rows, B_t=weight, offs=offs)

    GroupedExperts._grouped_mm = lambda self, **operands: torchtitan.grouped_mm(**operands)
    rows, weight = torch.randn(5, 4), torch.randn(2, 4, 3)
    got = GroupedExperts().forward(rows, weight, torch.tensor([2, 5], dtype=torch.int32))
    torch.testing.assert_close(got, torch.cat([rows[:2] @ weight[0], rows[2:] @ weight[1]]))


def test_counts_of_other_experts_are_refused():
    w = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match="num_tokens_per_expert: expected shape"):
        torchtitan.run_experts_grouped_mm(w, w, w, torch.zeros(3, 4), torch.tensor([1, 1, 1]))
