# SPDX-License-Identifier: MIT
"""Stored weights in modules: they move, are in a state dict, and stay as they are under a cast."""

import copy

import pytest
import torch

from kimi_ops import Fp8BlockWeight, Int4GroupWeight, grouped_gemm
from kimi_ops.nn import MLP, Experts, MoE, Router, StoredExperts, StoredWeight

HIDDEN, WIDTH, EXPERTS = 32, 16, 4
KINDS = {"fp8": Fp8BlockWeight, "int4": Int4GroupWeight}
NAMES = {"fp8": ["weight", "weight_scale_inv"], "int4": ["weight_packed", "weight_scale"]}


@pytest.fixture(params=KINDS)
def form(request):
    return request.param


def layer():
    torch.manual_seed(0)
    return MoE(Router(HIDDEN, EXPERTS, 2), Experts(EXPERTS, HIDDEN, WIDTH), MLP(HIDDEN, WIDTH))


def dequantised(moe):
    """The same layer with the values of its stored experts as parameters."""
    plain, stored = layer(), moe.experts
    with torch.no_grad():
        plain.experts.gate_up_proj.copy_(stored.gate_up_proj.dequantize(torch.float32))
        plain.experts.down_proj.copy_(stored.down_proj.dequantize(torch.float32))
    return plain


def test_stored_experts_compute_with_their_values(form):
    moe = layer()
    moe.experts = moe.experts.stored(form)
    plain, x = dequantised(moe), torch.randn(5, HIDDEN)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = moe(ours)
    torch.testing.assert_close(y, plain(theirs), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    plain(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moe.gate.weight.grad, plain.gate.weight.grad, rtol=1e-4, atol=1e-4)


def test_no_optimizer_sees_them_and_no_cast_changes_them(form):
    experts = layer().experts.eval().stored(form)
    assert not list(experts.parameters()) and not experts.training
    before = experts.state_dict()
    assert sorted(before) == sorted(f"{s}.{n}" for s in ("gate_up", "down") for n in NAMES[form])
    after = copy.deepcopy(experts).to(torch.float16).state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))


def test_they_move_and_come_back_from_a_state_dict(form):
    moe, x = layer(), torch.randn(5, HIDDEN)
    moe.experts = moe.experts.stored(form)
    other = layer()
    other.experts = StoredExperts(EXPERTS, HIDDEN, WIDTH, form=form, device="meta")
    assert other.experts.down_proj.device.type == "meta"
    other.experts.to_empty(device="cpu")
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))
    moved = moe.to("meta").experts.gate_up_proj
    assert type(moved) is KINDS[form] and moved.device.type == "meta"
    assert moved.shape == (EXPERTS, 2 * WIDTH, HIDDEN)


def test_one_weight_alone(form):
    weight = KINDS[form].quantize(torch.randn(2, 24, 32))
    stored = StoredWeight(weight)
    assert sorted(stored.state_dict()) == NAMES[form] and stored.form == form
    a, offsets = torch.randn(5, 32), torch.tensor([2, 5], dtype=torch.int32)
    expected = grouped_gemm(a, weight, offsets)
    assert torch.equal(grouped_gemm(a, stored.value, offsets), expected)
    assert stored.value.tensors().keys() == weight.tensors().keys()
    assert repr(stored) == f"StoredWeight({form}, shape=[2, 24, 32])"


def test_what_is_no_stored_form_is_refused():
    with pytest.raises(TypeError, match="StoredWeight: weight: expected Fp8Block.* got Tensor"):
        StoredWeight(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="form: expected one of fp8, int4, got 'i8'"):
        StoredExperts(2, 8, 8, form="i8")
    with pytest.raises(ValueError, match="Experts.stored: form: expected one of fp8, int4"):
        layer().experts.stored("int8")
    with pytest.raises(ValueError, match="expected K.* multiple of 8 nibbles a word, got 4"):
        StoredExperts(2, 8, 4, form="int4")
