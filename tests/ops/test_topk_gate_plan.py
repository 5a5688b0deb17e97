# SPDX-License-Identifier: MIT
"""gate_plan against the two ops that it is, and the plan on its way to the experts."""

import pytest
import torch

from kimi_ops import (
    Fp8BlockWeight,
    PermutePlan,
    _native,
    fused_experts,
    gate_plan,
    permute_plan,
    topk_gate,
)
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.reference import topk_gate as reference

OPTIONS = {
    "sigmoid": {"scaling_factor": 2.827},
    "softmax": {"score_function": "softmax", "renormalize": False},
    "groups": {"num_groups": 4, "topk_groups": 2},
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for name, a, b in zip(theirs._fields, ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


# One launch of one block, of a cluster, none; every width of the kernel.
SIZES = [
    (1, 8, 8), (5, 384, 8), (16, 40, 3), (33, 384, 8), (64, 24, 24), (65, 24, 2), (3, 896, 16),
    (2, 1000, 4), (7, 4, 1), (0, 12, 3),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens,experts,k", SIZES)
def test_the_bits_of_both_ops(engine, tokens, experts, k, options):
    given = OPTIONS[options]
    if options == "groups" and (experts < 8 or k > experts // 2):
        given = {}
    dtype = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}[tokens % 3]
    logits = (randn(tokens, experts) * 2).round().to(dtype).to(engine.device)  # full of ties
    if tokens > 2:
        logits[1] = float("nan")
    bias = (randn(experts, seed=1) / 8).to(engine.device)
    for valid in (None, torch.arange(tokens, device=engine.device) % 3 != 1):
        gate, plan = gate_plan(logits, k, expert_bias=bias, valid=valid, **given)
        wanted = topk_gate(logits, k, expert_bias=bias, valid=valid, **given)
        same(gate, wanted)
        same(plan, permute_plan(wanted.indices, experts))


def test_the_twin():
    logits = randn(9, 32)
    gate, plan = gate_plan(logits, 4, num_groups=4, topk_groups=2)
    theirs, their_plan = reference.gate_plan(logits, 4, num_groups=4, topk_groups=2)
    torch.testing.assert_close(gate.weights, theirs[0], rtol=1e-6, atol=0)
    assert torch.equal(gate.indices, theirs[1])
    same(plan, their_plan)


def test_the_gradient_is_that_of_the_gate(engine):
    grad = randn(6, 4).to(engine.device)

    def gradient(op):
        logits = randn(6, 32).to(engine.device).requires_grad_()
        found = op(logits, 4, scaling_factor=2.5)
        weights = found[0].weights if op is gate_plan else found.weights
        weights.backward(grad)
        return logits.grad

    assert torch.equal(gradient(gate_plan), gradient(topk_gate))


def test_opcheck_and_a_full_graph():
    logits = randn(12, 32).requires_grad_()
    valid = torch.arange(12) > 2
    arguments = (logits, 4, "sigmoid", randn(32), 4, 2, 2, True, 2.5, valid, "scores")
    torch.library.opcheck(torch.ops.kimi_ops.gate_plan.default, arguments)
    plain = torch.ops.kimi_ops.gate_plan_forward.default
    torch.library.opcheck(plain, (logits.detach(), *arguments[1:]))
    torch._dynamo.reset()
    w_gate_up, w_down = randn(32, 6, 5), randn(32, 5, 3)

    def layer(logits, x):
        gate, plan = gate_plan(logits * 1.5, 4)
        return fused_experts(x, w_gate_up, w_down, gate.weights, gate.indices, plan=plan)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 17):
        a = randn(tokens, 32).requires_grad_()
        b = a.detach().clone().requires_grad_()
        x, y = (f(z, randn(tokens, 5)) for f, z in ((compiled, a), (layer, b)))
        x.sum().backward()
        y.sum().backward()
        assert torch.equal(x, y) and torch.equal(a.grad, b.grad)


# ---- fused_experts with a plan


def layer_arguments(device, dtype=torch.float32):
    tensors = [randn(7, 16), randn(6, 24, 16, seed=1), randn(6, 16, 12, seed=2)]
    x, w_gate_up, w_down = (t.to(device, dtype).requires_grad_() for t in tensors)
    gate = topk_gate(randn(7, 6, seed=3).to(device), 2)
    return [x, w_gate_up, w_down, gate.weights.to(_wide(dtype)).requires_grad_(), gate.indices]


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_experts_with_a_plan_give_the_bits_of_those_without(engine, dtype, recompute):
    found = []
    for planned in (False, True):
        arguments = layer_arguments(engine.device, dtype)
        plan = permute_plan(arguments[4], 6) if planned else None
        y = fused_experts(*arguments, plan=plan, recompute=recompute)
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            assert torch.equal(y, fused_experts(*arguments, plan=plan))
        found.append([y, *(t.grad for t in arguments[:4])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_quantised_experts_with_a_plan():
    x, w_gate_up, w_down, weights, indices = layer_arguments("cpu")
    stored = [Fp8BlockWeight.quantize(w.detach()) for w in (w_gate_up, w_down)]
    plan = permute_plan(indices, 6)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            a, b = (fused_experts(x, *stored, weights, indices, plan=p) for p in (None, plan))
        assert a.requires_grad == grad and torch.equal(a, b)


def test_a_plan_that_leads_out_of_memory_is_refused():
    x, *rest, indices = layer_arguments("cpu")
    plan = permute_plan(indices, 6)
    wrong = plan._replace(row_map=plan.row_map + 99)
    with pytest.raises(ValueError, match="row_map.*expected -1..13, got .*the plan of these ids"):
        fused_experts(x, *rest, indices, plan=wrong)
    with pytest.raises(ValueError, match=r"source: expected shape \[14\]"):
        fused_experts(x, *rest, indices, plan=permute_plan(indices, 6, align=4))
    with pytest.raises(ValueError, match=r"offsets: expected shape \[6\]"):
        fused_experts(x, *rest, indices, plan=permute_plan(indices, 7))
    with pytest.raises(ValueError, match="row_map"):
        fused_experts(x, *rest, indices, plan=PermutePlan(*(t[:3] for t in plan)))


# ---- the reference model


def test_a_layer_of_the_model_at_decode_is_four_launches(simt_engine):
    """Gate and plan, two products, the sum; beside torch's own."""
    moe = KimiK2(KimiK2Config.tiny()).eval().moe_layers()[0]
    x = randn(1, 1, moe.config.hidden_size)
    with torch.no_grad():
        before = _native.engine.launches()
        moe(x)
        assert _native.engine.launches() - before == 4
