# SPDX-License-Identifier: MIT
"""A layer of no tokens, one under another default dtype, and tokens that it refuses."""

import pytest
import torch

from kimi_ops.nn import Experts, MoE, Router
from tests.nn.parts import EXPERTS, HIDDEN, TOP_K, WIDTH, layer


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def test_fp32_stays_fp32_under_another_default_dtype(default_dtype):
    linear = torch.nn.Linear(HIDDEN, EXPERTS, dtype=torch.float32)
    experts = Experts(EXPERTS, HIDDEN, WIDTH, dtype=torch.float32)
    moe = MoE(Router.from_linear(linear, TOP_K), experts, balance_coefficient=1e-2)
    assert moe.gate.e_score_correction_bias.dtype == torch.float32
    assert moe.auxiliary_loss().dtype == torch.float32
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float32)
    assert moe(x).dtype == moe.auxiliary_loss().dtype == torch.float32
    moe.update_bias_(1e-3)


@pytest.mark.parametrize("shape", [(0, HIDDEN), (0, 3, HIDDEN), (3, 0, HIDDEN)], ids=str)
def test_no_tokens(shape):
    moe = layer(balance_coefficient=1e-2, z_coefficient=1e-3)
    x = torch.zeros(shape, requires_grad=True)
    y = moe(x)
    (y.sum() + moe.auxiliary_loss()).backward()
    assert y.shape == shape and not moe.auxiliary_loss() and not moe.tokens_per_expert.any()


@pytest.mark.parametrize(
    "error, text, x, valid",
    [
        (ValueError, r"valid: expected shape \[2, 3\], got \[3, 2\]",
         torch.zeros(2, 3, HIDDEN), torch.ones(3, 2, dtype=torch.bool)),
        (ValueError, r"valid: expected shape \[2, 3\], got \[6\]",
         torch.zeros(2, 3, HIDDEN), torch.ones(6, dtype=torch.bool)),
        (TypeError, "valid: expected a torch.Tensor, got list",
         torch.zeros(2, HIDDEN), [True, False]),
        (ValueError, rf"x: expected \[..., H\] of tokens, got \[{HIDDEN}\]",
         torch.zeros(HIDDEN), None),
    ],
)  # fmt: skip
def test_tokens_that_do_not_fit_are_refused(error, text, x, valid):
    with pytest.raises(error, match=text):
        layer()(x, valid)
