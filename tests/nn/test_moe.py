# SPDX-License-Identifier: MIT
"""kimi_ops.nn.MoE: what it computes, counts, keeps and refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kimi_ops import sequence_balance_loss, update_expert_bias_, z_loss
from kimi_ops.activations import GPT_OSS, ungated
from kimi_ops.nn import MLP, Experts, MoE, Router
from kimi_ops.reference.fused_experts import activate
from tests.nn.parts import EXPERTS, HIDDEN, TOP_K, WIDTH, by_hand, layer


def tokens(*shape, **options):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, HIDDEN, generator=generator, **options)


def test_value_and_gradients_are_those_of_the_formula():
    moe, x = layer(), tokens(7).requires_grad_()
    leaves = [x, *moe.parameters()]
    dy = tokens(7) + 1
    ours = [moe(x), *torch.autograd.grad(moe(x), leaves, dy)]
    theirs = [by_hand(moe, x), *torch.autograd.grad(by_hand(moe, x), leaves, dy)]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_gradcheck_of_the_whole_layer():
    moe, x = layer().double(), tokens(4, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(moe(x), by_hand(moe, x))
    names, parameters = zip(*moe.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3), (0,)])
def test_tokens_of_any_shape(shape):
    moe, x = layer().eval(), tokens(*shape)
    y = moe(x)
    assert y.shape == x.shape
    assert torch.equal(y.flatten(0, -2), moe(x.flatten(0, -2)))


def test_tokens_that_are_not_valid_have_the_shared_experts_alone():
    moe, x = layer(), tokens(2, 4)
    valid = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    y = moe(x, valid)
    torch.testing.assert_close(y[~valid], moe.shared_experts(x[~valid]))
    torch.testing.assert_close(
        y.flatten(0, 1), by_hand(moe, x.flatten(0, 1), valid.flatten()), rtol=1e-4, atol=1e-5
    )
    assert int(moe.tokens_per_expert.sum()) == 6 * TOP_K


def test_the_state_of_transformers_layer_is_ours():
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K, n_group=1, topk_group=1, n_shared_experts=1,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    theirs, ours = DeepseekV3MoE(config), layer()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(tokens(2, 5)), theirs(tokens(2, 5)), rtol=1e-4, atol=1e-5)


# ---- balance


def test_loads_and_losses_are_those_of_training_forwards():
    moe, x = layer(balance_coefficient=0.1, z_coefficient=0.01), tokens(2, 5)
    moe(x)
    logits, gate, _ = moe.gate(x.flatten(0, 1))
    first = gate.tokens_per_expert.clone()
    balance = sequence_balance_loss(logits, gate.indices, num_sequences=2, coefficient=0.1)
    assert torch.equal(moe.balance_loss, balance)
    assert torch.equal(moe.z_loss, z_loss(logits, coefficient=0.01))
    torch.testing.assert_close(moe.auxiliary_loss(), moe.balance_loss + moe.z_loss)
    moe.auxiliary_loss().backward()
    assert moe.gate.weight.grad.abs().sum() > 0
    moe(x)
    assert torch.equal(moe.tokens_per_expert, 2 * first)
    moe.eval()(x)
    assert torch.equal(moe.tokens_per_expert, 2 * first) and moe.balance_loss is None
    moe.train().reset_statistics()
    assert not moe.tokens_per_expert.any() and moe.auxiliary_loss() == 0
    moe.per_sequence = False
    moe(x)
    whole = sequence_balance_loss(logits, gate.indices, coefficient=0.1)
    assert torch.equal(moe.balance_loss, whole) and not torch.equal(whole, balance)


def test_padding_is_in_no_loss():
    moe, x = layer(balance_coefficient=0.1, z_coefficient=0.01), tokens(2, 5)
    valid = torch.arange(5) < torch.tensor([[3], [5]])
    moe(x, valid)
    padded = moe.balance_loss
    alone = []
    for row, length in enumerate((3, 5)):
        moe(x[row, :length])
        alone.append(moe.balance_loss)
    torch.testing.assert_close(padded, torch.stack(alone).mean())
    moe(x, valid)
    kept = moe.gate(x[valid])[0]
    torch.testing.assert_close(moe.z_loss, z_loss(kept, coefficient=0.01))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_forward_counts_once(reentrant):
    moe, x = layer(balance_coefficient=0.1), tokens(5).requires_grad_()
    y = checkpoint(moe, x, use_reentrant=reentrant)
    last = moe.balance_loss
    y.sum().backward()
    assert int(moe.tokens_per_expert.sum()) == 5 * TOP_K and moe.balance_loss is last


def test_the_bias_moves_by_the_loads_of_all_ranks(monkeypatch):
    moe, twin = layer(), layer()
    moe(tokens(9))
    others = torch.arange(EXPERTS, dtype=torch.int32)
    expected = twin.gate.e_score_correction_bias
    update_expert_bias_(expected, moe.tokens_per_expert + others, 0.01, True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda counts, group: counts.add_(others))
    bias = moe.update_bias_(0.01, centered=True, group=object())
    assert bias is moe.gate.e_score_correction_bias and torch.equal(bias, expected)
    assert not moe.tokens_per_expert.any()
    moe(tokens(9))
    update_expert_bias_(expected, moe.tokens_per_expert, 0.01)
    assert torch.equal(moe.update_bias_(0.01), expected)


# ---- casts, copies, errors


def test_casts_leave_the_bias_in_fp32_and_counts_out_of_the_state():
    moe = layer()
    bias = moe.gate.e_score_correction_bias.clone()
    moe.bfloat16()
    assert torch.equal(moe.gate.e_score_correction_bias, bias)
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert moe(tokens(5).bfloat16()).dtype == torch.bfloat16
    assert sorted(moe.state_dict()) == [
        "experts.down_proj", "experts.gate_up_proj", "gate.e_score_correction_bias", "gate.weight",
        "shared_experts.down_proj.weight", "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight",
    ]  # fmt: skip
    meta = moe.to("meta").gate.e_score_correction_bias
    assert meta.is_meta and meta.dtype == torch.float32


def test_autocast_rounds_products_and_no_scores():
    moe, x = layer(), tokens(8)
    with torch.autocast("cpu", torch.bfloat16):
        y, (logits, gate, _) = moe(x), moe.gate(x)
    assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32
    exact = moe.gate(x)[1]
    assert torch.equal(gate.weights, exact.weights) and torch.equal(gate.indices, exact.indices)
    torch.testing.assert_close(y.float(), moe(x), rtol=0.05, atol=0.02)
    y.sum().backward()
    assert {p.grad.dtype for p in moe.parameters()} == {torch.float32}


def test_copies_leave_losses_behind():
    moe = layer(balance_coefficient=0.1, z_coefficient=0.1)
    moe(tokens(5))
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert twin.balance_loss is None and twin.z_loss is None
        assert torch.equal(twin(tokens(5)), moe(tokens(5)))


def test_a_router_of_a_linear_layer_shares_its_parameters():
    linear = nn.Linear(HIDDEN, EXPERTS)
    gate = Router.from_linear(linear, TOP_K, score_function="softmax")
    assert gate.weight is linear.weight and gate.bias is linear.bias
    logits, choice, plan = gate(tokens(5), planned=True)
    torch.testing.assert_close(logits, linear(tokens(5)))
    assert torch.equal(plan.tokens_per_expert, choice.tokens_per_expert)
    assert not gate.e_score_correction_bias.any()
    bare = Router.from_linear(nn.Linear(HIDDEN, EXPERTS, bias=False), 2, expert_bias=False)
    assert list(bare.state_dict()) == ["weight"] and bare(tokens(5))[2] is None


@pytest.mark.parametrize("activation", ["relu2", GPT_OSS, ungated("relu2")], ids=str)
def test_biases_and_other_activations(activation):
    torch.manual_seed(0)
    experts = Experts(EXPERTS, HIDDEN, WIDTH, bias=True, activation=activation)
    assert not experts.gate_up_proj_bias.any() and not experts.down_proj_bias.any()
    nn.init.normal_(experts.gate_up_proj_bias)
    nn.init.normal_(experts.down_proj_bias)
    moe, x = MoE(Router(HIDDEN, EXPERTS, TOP_K), experts), tokens(6)
    _, gate, _ = moe.gate(x)
    rows = []
    for token, weights, ids in zip(x, gate.weights, gate.indices, strict=True):
        parts = []
        for weight, e in zip(weights, ids, strict=True):
            sums = experts.gate_up_proj[e] @ token + experts.gate_up_proj_bias[e]
            halves = sums.chunk(2) if sums.shape[0] == 2 * WIDTH else (sums, None)
            hidden = activate(*halves, activation)
            parts.append(weight * (experts.down_proj[e] @ hidden + experts.down_proj_bias[e]))
        rows.append(sum(parts))
    torch.testing.assert_close(moe(x), torch.stack(rows), rtol=1e-4, atol=1e-5)
    moe(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in experts.parameters())


def test_recompute_gives_the_same_bits():
    moe, x = layer(), tokens(9)
    moe(x).square().sum().backward()
    first = [p.grad.clone() for p in moe.parameters()]
    moe.zero_grad()
    moe.experts.recompute = True
    moe(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(moe.parameters(), first, strict=True))


@pytest.mark.parametrize(
    "error,text,call",
    [
        (ValueError, "MoE: experts: expected 6 experts of hidden size 24.*got 6 of 8",
         lambda: MoE(Router(24, 6, 2), Experts(6, 8, 4))),
        (ValueError, "MoE: experts: expected 6 experts .*got 5 of 24",
         lambda: MoE(Router(24, 6, 2), Experts(5, 24, 4))),
        (ValueError, "Experts: activation: expected one of silu, .*got 'relu'",
         lambda: Experts(4, 8, 4, activation="relu")),
        (ValueError, "MLP: activation: expected one of silu, .*got 'relu'",
         lambda: MLP(8, 4, activation="relu")),
        (ValueError, "MoE.update_bias_: gate: expected a Router with a bias .*expert_bias=True",
         lambda: MoE(Router(8, 4, 2, expert_bias=False), Experts(4, 8, 4)).update_bias_(0.1)),
        (ValueError, "gate_plan: k: expected 1..6", lambda: MoE(
            Router(24, 6, 7), Experts(6, 24, 4))(tokens(3))),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(error, text, call):
    with pytest.raises(error, match=text):
        call()
