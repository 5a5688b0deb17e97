# SPDX-License-Identifier: MIT
"""fused_experts against transformers' experts and a loop over tokens in fp64."""

import math

import pytest
import torch
from rounding import error
from torch import Tensor

from kimi_ops import Fp8BlockWeight, fused_experts, permute_plan, topk_gate


def activation(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """Written with other functions than the library's."""
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if name == "gelu":
        return 0.5 * gate * (1 + torch.special.erf(gate / math.sqrt(2))) * up
    bounded = 4 * torch.tanh(gate / 4) / (1 + torch.exp(-gate))
    return bounded * 25 * torch.tanh(up / 25)


def exact(x, w_gate_up, w_down, weights, indices, name="silu") -> Tensor:
    """[T, H] fp64, token by token and slot by slot; differentiable."""
    width = w_down.shape[2]
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for k, expert in enumerate(indices[t].tolist()):
            if expert >= 0:
                both = w_gate_up[expert].double() @ x[t].double()
                hidden = activation(name, both[:width], both[width:])
                total = total + weights[t, k].double() * (w_down[expert].double() @ hidden)
        rows.append(total)
    return torch.stack(rows)


def tensors(tokens, experts, k, hidden, width, dtype=torch.float32, drop=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    logits = normal(tokens, experts)
    gate = topk_gate(logits, k)
    indices = gate.indices.masked_fill(torch.rand(tokens, k, generator=generator) < drop, -1)
    return [
        normal(tokens, hidden).to(dtype),
        (normal(experts, 2 * width, hidden) / hidden**0.5).to(dtype),
        (normal(experts, hidden, width) / width**0.5).to(dtype),
        gate.weights.double() if dtype == torch.float64 else gate.weights,
        indices,
    ]


SHAPES = {
    "usual": (23, 8, 3, 12, 10),
    "one token": (1, 8, 2, 12, 10),
    "one slot": (9, 8, 1, 12, 10),
    "one expert": (9, 1, 1, 12, 10),
    "odd sizes": (17, 5, 2, 7, 3),
    "every expert": (6, 4, 4, 8, 8),
}


@pytest.mark.parametrize("name", ["silu", "gelu", "situ"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_value_and_gradients_in_float32(name, shape, drop):
    *floats, indices = tensors(*shape, drop=drop)
    ours = [t.clone().requires_grad_() for t in floats]
    other = [t.clone().requires_grad_() for t in floats]
    y = fused_experts(*ours, indices, activation=name)
    expected = exact(*other, indices, name)
    dy = torch.randn(shape[3], shape[0]).t()
    y.backward(dy)
    expected.backward(dy.double())
    if not bool((indices >= 0).any()):
        assert not y.any()
        return
    assert error(y, expected) < 1e-6
    for mine, theirs in zip(ours, other, strict=True):
        assert error(mine.grad, theirs.grad) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    *floats, indices = tensors(40, 8, 3, 32, 24, dtype)
    y = fused_experts(*floats, indices)
    assert y.dtype == dtype
    assert error(y, exact(*floats, indices)) < (6e-3 if dtype == torch.bfloat16 else 8e-4)


@pytest.mark.parametrize("name", ["silu", "gelu", "situ"])
def test_gradients_in_float64(name):
    *floats, indices = tensors(5, 4, 2, 3, 2, torch.float64, drop=0.2, seed=1)
    for t in floats:
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: fused_experts(*t, indices, activation=name), floats)


def test_autocast_casts_tokens_and_matrices():
    x, w_gate_up, w_down, weights, indices = tensors(40, 8, 3, 32, 24)
    w_down.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_experts(x, w_gate_up, w_down, weights, indices)
    half = (x.bfloat16(), w_gate_up.bfloat16(), w_down.bfloat16())
    assert torch.equal(y, fused_experts(*half, weights, indices))
    y.sum().backward()
    assert w_down.grad.dtype == torch.float32 and w_down.grad.any()


def test_no_tokens_and_no_experts_chosen(engine):
    """Of no tokens a GPU asks for no workspace."""
    x, w_gate_up, w_down, weights, indices = (t.to(engine.device) for t in tensors(4, 3, 2, 6, 5))
    biases = {"b_gate_up": torch.ones_like(w_gate_up[:, :, 0]), "b_down": w_down[:, :, 0].clone()}
    wanted = [w_gate_up, *biases.values()]
    for parameter in wanted:
        parameter.requires_grad_()
    empty = fused_experts(x[:0], w_gate_up, w_down, weights[:0], indices[:0], **biases)
    assert empty.shape == (0, 6)
    y = fused_experts(x, w_gate_up, w_down, weights, torch.full_like(indices, -1), **biases)
    assert not y.any()
    (y.sum() + empty.sum()).backward()
    assert not any(parameter.grad.any() for parameter in wanted)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_transformers(implementation):
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=64,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        routed_scaling_factor=2.827,
    )
    config._experts_implementation = implementation
    moe = DeepseekV3MoE(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.2)
        moe.gate.e_score_correction_bias.normal_(0, 0.2)
    x = torch.randn(50, 64)

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = moe(theirs[None])[0]
    grads = torch.autograd.grad(expected.square().sum(), [theirs, *moe.parameters()])
    gate = topk_gate(
        ours @ moe.gate.weight.t(),
        4,
        expert_bias=moe.gate.e_score_correction_bias,
        scaling_factor=2.827,
    )
    experts = moe.experts
    y = fused_experts(ours, experts.gate_up_proj, experts.down_proj, gate.weights, gate.indices)
    y = y + moe.shared_experts(ours)
    assert error(y, expected) < 1e-6
    mine = torch.autograd.grad(y.square().sum(), [ours, *moe.parameters()])
    for gradient, other in zip(mine, grads, strict=True):
        assert error(gradient, other) < 1e-5


def test_twenty_runs_have_the_same_bits():
    arguments = tensors(200, 16, 4, 32, 24)
    results = [fused_experts(*arguments) for _ in range(20)]
    assert all(torch.equal(results[0], other) for other in results)


def test_odd_sizes_of_fp8_weights():
    x, w_gate_up, w_down, weights, indices = tensors(9, 4, 2, 9, 7)
    gate_up, down = Fp8BlockWeight.quantize(w_gate_up), Fp8BlockWeight.quantize(w_down)
    wide = [w.dequantize(torch.float32) for w in (gate_up, down)]
    y = fused_experts(x, gate_up, down, weights, indices)
    assert error(y, exact(x, *wide, weights, indices)) < 1e-6


def test_no_hidden_and_no_width(engine):
    x, _, _, weights, indices = (t.to(engine.device) for t in tensors(4, 3, 2, 6, 5))
    empty = fused_experts(x[:, :0], x.new_ones(3, 10, 0), x.new_ones(3, 0, 5), weights, indices)
    assert empty.shape == (4, 0)
    w_down = x.new_ones(3, 6, 0).requires_grad_()
    y = fused_experts(x, x.new_ones(3, 0, 6), w_down, weights, indices)
    y.sum().backward()
    assert not y.any() and w_down.grad.shape == (3, 6, 0)
    none = fused_experts(x[:, :0], x.new_ones(3, 0, 0), x.new_ones(3, 0, 0), weights, indices)
    assert none.shape == (4, 0)


def test_of_no_hidden_size_the_backward_gets_the_biases(engine):
    """They are all of [g; u], which is there to be read."""
    weights, indices = (t.to(engine.device) for t in tensors(4, 3, 2, 6, 5)[3:])
    bias = torch.arange(30.0, device=engine.device).view(3, 10)
    x, w_gate_up, w_down = bias.new_ones(4, 0), bias.new_ones(3, 10, 0), bias.new_ones(3, 0, 5)
    plan = permute_plan(indices, 3)
    arguments = x, w_gate_up, w_down, weights, plan.row_map, plan.source, plan.offsets
    _, gate_up = torch.ops.kimi_ops.fused_experts(
        *arguments, None, None, bias, None, "silu", [], False, True
    )
    assert torch.equal(gate_up, bias[indices.flatten()[plan.source.long()].long()])


@pytest.mark.parametrize("name", ["silu", "gelu", "situ"])
def test_recomputing_changes_no_gradient_beyond_rounding(name):
    *floats, indices = tensors(33, 8, 3, 24, 20)
    gradients = []
    for recompute in (False, True):
        ours = [t.clone().requires_grad_() for t in floats]
        fused_experts(*ours, indices, activation=name, recompute=recompute).sum().backward()
        gradients.append([t.grad for t in ours])
    for kept, again in zip(*gradients, strict=True):
        assert error(kept, again) < 1e-6


def test_memory_of_the_backward():
    """No gradient of the saved [g; u] is made up, and recomputing keeps none of it."""
    *floats, indices = tensors(256, 8, 4, 16, 256)
    rows, width = 256 * 4, 2 * 256
    kept = {}
    for recompute in (False, True):
        ours = [t.clone().requires_grad_() for t in floats]
        y = fused_experts(*ours, indices, recompute=recompute)
        saved = [t for t in y.grad_fn.saved_tensors if t is not None]
        kept[recompute] = any(tuple(t.shape) == (rows, width) for t in saved)
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
            y.backward(torch.ones_like(y))
        assert not any(e.name == "aten::zeros" for e in profile.events())
    assert kept == {False: True, True: False}


BAD_CALLS = [
    ({"activation": "relu"}, ValueError, "activation: expected one of silu, gelu, situ, gelu_tanh"),
    ({"x": lambda t: t.int()}, TypeError, "x: expected bfloat16, float16, float32, float64"),
    ({"x": lambda t: t[None]}, ValueError, r"x: expected shape \[T, H\]"),
    ({"w_gate_up": lambda t: t.half()}, TypeError, "w_gate_up: expected float32"),
    ({"w_gate_up": lambda t: t[:, :9]}, ValueError, r"w_gate_up: expected shape \[E, 2F, H=6\]"),
    ({"w_gate_up": lambda t: t[..., :5]}, ValueError, r"w_gate_up: expected shape \[E, 2F, H=6\]"),
    ({"w_down": lambda t: t[:, :, :4]}, ValueError, r"w_down: expected shape \[3, 6, 5\]"),
    ({"w_down": lambda t: t[:2]}, ValueError, r"w_down: expected shape \[3, 6, 5\]"),
    ({"weights": lambda t: t.double()}, TypeError, "weights: expected float32"),
    ({"weights": lambda t: t[:, :1]}, ValueError, r"weights: expected shape \[4, 2\]"),
    ({"indices": lambda t: t.short()}, TypeError, "indices: expected int32"),
    ({"indices": lambda t: t[:3]}, ValueError, r"indices: expected shape \[T=4, K >= 1\]"),
    ({"indices": lambda t: t + 4}, ValueError, r"indices: expected ids in -1 \.\. 3"),
    ({"indices": lambda t: t - 2}, ValueError, r"indices: expected ids in -1 \.\. 3"),
    ({"w_down": lambda t: t.to("meta")}, ValueError, "w_down: expected on cpu as x, got meta"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_CALLS)
def test_bad_calls(changes, kind, message):
    names = ("x", "w_gate_up", "w_down", "weights", "indices")
    arguments = dict(zip(names, tensors(4, 3, 2, 6, 5), strict=True))
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(kind, match=f"fused_experts: {message}"):
        fused_experts(**arguments)
