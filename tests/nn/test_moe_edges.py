# SPDX-License-Identifier: MIT
"""A layer of no tokens, one under another default dtype, and tokens that it refuses."""

import pytest
import torch

from kimi_ops import topk_gate
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


def test_recompute_keeps_no_first_product():
    def kept(recompute):
        sizes = []
        experts = Experts(EXPERTS, HIDDEN, WIDTH, recompute=recompute)
        gate = topk_gate(torch.randn(5, EXPERTS), TOP_K)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            experts(torch.randn(5, HIDDEN), gate)
        return sum(sizes)

    assert kept(False) - kept(True) == 5 * TOP_K * 2 * WIDTH


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_stored_experts_have_the_biases(form):
    experts = Experts(EXPERTS, HIDDEN, WIDTH, bias=True).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_()
    gate, x = topk_gate(torch.randn(5, EXPERTS), TOP_K), torch.randn(5, HIDDEN)
    stored = experts.stored(form)
    plain = Experts(EXPERTS, HIDDEN, WIDTH, bias=True).requires_grad_(False)
    plain.load_state_dict(experts.state_dict())
    plain.gate_up_proj.copy_(stored.gate_up_proj.dequantize(torch.float32))
    plain.down_proj.copy_(stored.down_proj.dequantize(torch.float32))
    torch.testing.assert_close(stored(x, gate), plain(x, gate), rtol=1e-4, atol=1e-4)


def test_a_router_asked_for_no_plan_gives_none():
    for router in (Router(HIDDEN, EXPERTS, TOP_K), Router(HIDDEN, EXPERTS, TOP_K).double()):
        assert router(torch.randn(5, HIDDEN))[2] is None


def test_parameters_are_drawn_as_those_of_linear_layers():
    torch.manual_seed(0)
    experts, router = Experts(EXPERTS, HIDDEN, WIDTH), Router(HIDDEN, 64, TOP_K, bias=True)
    for drawn, inputs in (
        (experts.gate_up_proj, HIDDEN), (experts.down_proj, WIDTH), (router.weight, HIDDEN),
        (router.bias, HIDDEN),
    ):  # fmt: skip
        assert 0.9 < drawn.abs().max() * inputs**0.5 <= 1
