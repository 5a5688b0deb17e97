# SPDX-License-Identifier: MIT
"""Activations with numbers, biases, weights before the down projection, w1 and w3 apart, experts
without a gate: values from elsewhere, a loop in fp64, gradients."""

import math

import pytest
import torch
from rounding import error
from torch import Tensor

from kimi_ops import Fp8BlockWeight, fused_experts, join_gate_up_, permute_plan, topk_gate
from kimi_ops.activations import GPT_OSS, Activation, of, situ, swiglu, ungated
from kimi_ops.operators import fused_experts as operators

FORMS = {
    "gelu_tanh": of("gelu_tanh"),
    "relu2": of("relu2"),
    "situ": situ(3.0, 2.0),
    "situ without a bound of u": situ(3.0, None),
    "limit before": swiglu(1.5),
    "limit after": swiglu(0.5, clamp="after"),
    "gpt-oss": swiglu(1.5, alpha=1.702, shift=1.0),
}
UNGATED = {"relu2": ungated("relu2"), "gelu": ungated("gelu"), "situ": ungated(situ(3.0))}


def value(form: Activation, g: Tensor, u: Tensor) -> Tensor:
    """Written with other functions than the library's."""
    u = u if form.gated else torch.ones_like(g)
    if form.name == "silu":
        return g / (1 + torch.exp(-g)) * u
    if form.name == "gelu":
        return 0.5 * g * (1 + torch.special.erf(g / math.sqrt(2))) * u
    if form.name == "gelu_tanh":
        return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    if form.name == "relu2":
        return torch.where(g > 0, g * g, 0 * g) * u
    if form.name == "situ":
        b, c = form.numbers
        up = u if math.isinf(c) or not form.gated else c * torch.tanh(u / c)
        return b * torch.tanh(g / b) / (1 + torch.exp(-g)) * up
    alpha, shift, before, after, up_limit = form.numbers
    g = torch.where(g > before, before, g)
    a = g / (1 + torch.exp(-alpha * g))
    u = torch.where(u > up_limit, up_limit, torch.where(u < -up_limit, -up_limit, u))
    return torch.where(a > after, after, a) * (u + shift)


def exact(x, w_gate_up, w_down, weights, b_gate_up, b_down, indices, form) -> Tensor:
    """[T, H] fp64, token by token and slot by slot; differentiable."""
    rows, experts = [], len(w_down)
    for t in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for k, e in enumerate(indices[t].tolist()):
            if 0 <= e < experts:
                both = w_gate_up[e].double() @ x[t].double()
                both = both if b_gate_up is None else both + b_gate_up[e].double()
                g, u = both.chunk(2) if form.gated else (both, both)
                y = w_down[e].double() @ value(form, g, u)
                y = y if b_down is None else y + b_down[e].double()
                total = total + weights[t, k].double() * y
        rows.append(total)
    return torch.stack(rows)


def tensors(form=None, tokens=21, experts=5, k=2, hidden=24, width=20, dtype=torch.float32):
    """x, w_gate_up, w_down, weights, b_gate_up, b_down; and ids, some of them -1 or E."""
    torch.manual_seed(0)
    rows = width if form is not None and not form.gated else 2 * width
    gate = topk_gate(torch.randn(tokens, experts), k)
    drop = torch.rand(tokens, k)
    indices = gate.indices.masked_fill(drop < 0.1, -1).masked_fill(drop > 0.9, experts)
    shapes = (experts, rows, hidden), (experts, hidden, width), (experts, rows), (experts, hidden)
    w_gate_up, w_down, b_gate_up, b_down = (torch.randn(s) / s[-1] ** 0.5 for s in shapes)
    floats = [torch.randn(tokens, hidden), w_gate_up, w_down, b_gate_up * 3, b_down * 3]
    x, w_gate_up, w_down, b_gate_up, b_down = (t.to(dtype) for t in floats)
    weights = gate.weights.double() if dtype == torch.float64 else gate.weights
    return [x, w_gate_up, w_down, weights, b_gate_up, b_down], indices


def run(floats, indices, **options) -> Tensor:
    x, w_gate_up, w_down, weights, b_gate_up, b_down = floats
    return fused_experts(
        x, w_gate_up, w_down, weights, indices, b_gate_up=b_gate_up, b_down=b_down, **options
    )


def compare(floats, indices, form, bound, **options) -> None:
    """Value and every gradient with the loop's."""
    ours, theirs = ([t.clone().requires_grad_() for t in floats] for _ in range(2))
    y, want = run(ours, indices, activation=form, **options), exact(*theirs, indices, form)
    dy = torch.randn(len(y), 2 * y.shape[1]).to(y.dtype)[:, : y.shape[1]]  # rows apart
    assert error(y, want) < bound
    for name, mine, other in zip(
        ("x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down"),
        torch.autograd.grad(y, ours, dy),
        torch.autograd.grad(want, theirs, dy.double()),
        strict=True,
    ):
        assert mine.dtype == other.dtype and error(mine, other) < 3 * bound, name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms_with_biases(gemm_engine, form):
    floats, indices = tensors()
    compare(floats, indices, form, 2e-6)
    with torch.no_grad():
        kept, again = (run(floats, indices, activation=form, recompute=r) for r in (False, True))
    assert torch.equal(kept, again)


@pytest.mark.parametrize("form", ["silu", "gelu", "gpt-oss"])
@pytest.mark.parametrize("recompute", [False, True])
def test_half_precision_with_biases(gemm_engine, form, recompute):
    floats, indices = tensors(hidden=64, width=32, dtype=torch.bfloat16)
    compare(floats, indices, FORMS.get(form) or of(form), 1.2e-2, recompute=recompute)


def test_one_bias_alone(gemm_engine):
    for missing in (4, 5):
        floats, indices = tensors()
        floats[missing] = None
        leaves = [t if t is None else t.clone().requires_grad_() for t in floats]
        y, want = run(leaves, indices), exact(*leaves, indices, of("silu"))
        assert error(y, want) < 2e-6
        wanted = [t for t in leaves if t is not None]
        for mine, other in zip(
            torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(want.sum(), wanted),
            strict=True,
        ):  # fmt: skip
            assert error(mine, other) < 6e-6


def test_biases_of_many_columns(gemm_engine):
    """More than a task of the CPU, a block of its products or of CUDA's threads takes."""
    floats, indices = tensors(tokens=6, experts=2, hidden=528, width=272)
    compare(floats, indices, of("silu"), 2e-6)


def test_sums_of_many_rows(cpu_engine):
    """So many that their products fit the buffer of sums for some columns at a time."""
    tokens, hidden = 12_000, 450
    torch.manual_seed(0)
    shapes = (tokens, hidden), (2, 2, hidden), (2, hidden, 1), (tokens, 2), (2, hidden)
    leaves = [(torch.randn(s) / s[-1] ** 0.5).requires_grad_() for s in shapes]
    x, w_gate_up, w_down, weights, biases = leaves
    indices = (torch.arange(tokens)[:, None] + torch.arange(2)).int() % 2
    y = run([*leaves[:4], None, biases], indices)
    want = torch.zeros(tokens, hidden)
    for e in range(2):
        gate, up = (x @ w_gate_up[e].t()).unbind(1)
        row = (gate * gate.sigmoid() * up)[:, None] * w_down[e, :, 0] + biases[e]
        want = want + weights.gather(1, (indices == e).int().argmax(1, keepdim=True)) * row
    assert error(y, want) < 1e-6
    dy = torch.randn(tokens, hidden)
    for mine, other in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert error(mine, other) < 3e-6


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_gradients_in_float64(form):
    floats, indices = tensors(tokens=4, experts=3, hidden=3, width=2, dtype=torch.float64)
    for t in floats:
        t.requires_grad_()
    for first in (False, True):
        options = {"activation": form, "weights_first": first}
        assert torch.autograd.gradcheck(
            lambda *t, options=options: run(t, indices, **options), floats
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["silu", "gpt-oss"])
def test_weights_before_the_down_projection(gemm_engine, form, dtype):
    """The same value; with b_down composed, which is weighted all the same."""
    form, bound = FORMS.get(form) or of(form), 2e-6 if dtype == torch.float32 else 1.2e-2
    floats, indices = tensors(hidden=64, width=32, dtype=dtype)
    compare(floats, indices, form, bound, weights_first=True)
    floats[5] = None
    ours = [t if t is None else t.clone().requires_grad_() for t in floats]
    y = run(ours, indices, activation=form, weights_first=True)
    assert error(y, exact(*floats, indices, form)) < bound
    after = run(ours, indices, activation=form)
    inputs = [t for t in ours if t is not None]
    dy = torch.randn(y.shape).to(dtype)
    for mine, other in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(after, inputs, dy), strict=True
    ):
        assert torch.equal(mine, other)
    if dtype == torch.bfloat16:  # the roundings are others
        assert not torch.equal(y, after)


@pytest.mark.parametrize("form", UNGATED.values(), ids=UNGATED.keys())
def test_experts_without_a_gate(form):
    floats, indices = tensors(form)
    compare(floats, indices, form, 2e-6)
    compare(floats, indices, form, 2e-6, weights_first=True)
    wide = [t.double() for t in floats]
    assert error(run(wide, indices, activation=form), exact(*wide, indices, form)) < 1e-12


# News of other libraries: Moonshot's SiTU-GLU of betas 4 and 25 with its slopes, OpenAI's gate of
# 1.702 and 7, limits before (DeepSeek-V4's 10) and after (Step-3.7's 7).
SITU = {
    (1, 1): (0.715817828, 0.879352708, 0.715054859),
    (-1, 2): (-0.525828896, 0.120130237, -0.261796021),
    (3, -7): (-16.5114794, -4.66031708, 2.23986317),
    (10, 30): (82.2458215, 0.557926932, 1.20369371),
    (100, 1000): (100, 0, 0),
}
LIMITED = {
    GPT_OSS: (2.5373873, 55.999625, 0.108427858, -41.9997188),
    swiglu(10.0): (1.46211716, 71.9758548, 1.13822096, -99.9954602),
    swiglu(7.0, clamp="after"): (1.46211716, 49, 0.995943337, -49),
}


def one_expert(form: Activation, g: float, u: float) -> tuple[Tensor, Tensor]:
    """act(g, u), and its gradient in both, through an op whose other parts are ones."""
    both = torch.tensor([[[g], [u]]], dtype=torch.float32, requires_grad=True)
    one = torch.ones(1, 1)
    y = fused_experts(one, both, one[None], one, one.int() - 1, activation=form)
    (gradient,) = torch.autograd.grad(y, both)
    return y.detach(), gradient.flatten()


def test_values_of_others(gemm_engine):
    for (g, u), (h, dg, du) in SITU.items():
        y, gradient = one_expert(situ(), g, u)
        torch.testing.assert_close(y, torch.full((1, 1), float(h)), rtol=2e-6, atol=1e-30)
        torch.testing.assert_close(
            gradient, torch.tensor([dg, du], dtype=torch.float32), rtol=2e-5, atol=1e-12
        )
    for form, values in LIMITED.items():
        for (g, u), h in zip(((1, 2), (8, 9), (-3, -8), (12, -11)), values, strict=True):
            y, _ = one_expert(form, g, u)
            torch.testing.assert_close(y, torch.full((1, 1), float(h)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("form", [*FORMS.values(), of("silu")], ids=lambda form: form.name)
def test_not_a_number_stays_one(gemm_engine, form):
    for g, u in ((math.nan, 1.0), (1.0, math.nan)):
        assert one_expert(form, g, u)[0].isnan().all()


def test_slopes_at_limits_are_those_within(gemm_engine):
    form = swiglu(2.0)
    assert one_expert(form, 2.0, 2.0)[1].all() and not one_expert(form, 2.1, -2.1)[1].any()
    after = swiglu(0.5, clamp="after")
    assert not one_expert(after, 3.0, 0.1)[1][0] and one_expert(after, 0.3, 0.5)[1].all()


@pytest.mark.parametrize("form", ["silu", "gpt-oss"])
def test_gate_and_up_apart(form):
    """Two parameters: composed, without a copy; neighbours in memory: the bits of one tensor."""
    form = FORMS.get(form) or of(form)
    floats, indices = tensors()
    w1, w3 = (torch.nn.Parameter(w.clone()) for w in floats[1].chunk(2, dim=1))
    leaves = [floats[0].clone().requires_grad_(), floats[2].clone().requires_grad_()]

    def both(pair):
        y = run([leaves[0], pair, leaves[1], *floats[3:]], indices, activation=form)
        inputs = [*leaves, *(pair if isinstance(pair, tuple) else (pair,))]
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    together = both(floats[1].clone().requires_grad_())
    apart = both((w1, w3))
    before = w1.detach().clone(), w3.detach().clone()
    join_gate_up_(w1, w3)
    assert torch.equal(w1, before[0]) and torch.equal(w3, before[1])
    joined = both((w1, w3))
    whole = (*joined[:3], torch.cat(joined[3:], dim=1))
    assert all(torch.equal(mine, other) for mine, other in zip(whole, together, strict=True))
    for mine, other in zip(apart, joined, strict=True):
        assert error(mine, other) < 3e-6
    y = run([leaves[0], (w1, w3), leaves[1], *floats[3:]], indices)
    y.sum().backward()
    assert w1.grad.shape == w1.shape and w3.grad.shape == w3.shape


def test_two_matrices_in_float64_and_beside_a_plan():
    floats, indices = tensors(dtype=torch.float64)
    pair = tuple(w.clone() for w in floats[1].chunk(2, dim=1))
    y = run([floats[0], pair, *floats[2:]], indices)
    assert torch.equal(y, run(floats, indices))
    narrow = [t.float() for t in floats]
    plan = permute_plan(indices, 5)
    halves = tuple(w.float().clone() for w in pair)
    mine = run([narrow[0], halves, *narrow[2:]], indices, plan=plan)
    assert error(mine, run(narrow, indices, plan=plan)) < 1e-6


def test_ids_and_weights_as_routers_give_them(gemm_engine):
    """int64 ids, E as well as -1 dropped, weights of 16 bits, with gradients into them."""
    floats, indices = tensors()
    assert bool((indices == 5).any() and (indices == -1).any())
    floats[3] = floats[3].bfloat16().float()
    want = run(floats, indices)
    floats[3] = floats[3].bfloat16().requires_grad_()
    y = run(floats, indices.long())
    assert torch.equal(y, want)
    y.sum().backward()
    assert floats[3].grad.dtype == torch.bfloat16 and floats[3].grad.any()
    if gemm_engine.device == "cpu" and not gemm_engine.slow:
        for bad in (2**32, -(2**32)):
            with pytest.raises(ValueError, match="indices: expected ids in -1 .. 5"):
                run(floats, indices.long() + bad)


def test_biases_beside_quantised_weights():
    floats, indices = tensors(hidden=32, width=16)
    stored = [Fp8BlockWeight.quantize(w) for w in floats[1:3]]
    wide = [w.dequantize(torch.float32) for w in stored]
    x, _, _, weights, *biases = floats
    want = exact(x, *wide, weights, *biases, indices, GPT_OSS)
    y = run([x, *stored, weights, *biases], indices, activation=GPT_OSS)
    assert error(y, want) < 1e-6
    bias = biases[0].requires_grad_()
    y = run([x, *stored, weights, *biases], indices, activation=GPT_OSS)
    assert error(y, want) < 1e-6 and torch.autograd.grad(y.sum(), bias)[0].any()


def test_opcheck_and_compile():
    floats, indices = tensors()
    plan = permute_plan(indices.clamp(0, 4), 5)  # rows of dropped pairs of [g; u] are not set
    ids = plan.row_map, plan.source, plan.offsets
    leaves = [t.clone().requires_grad_() for t in floats]
    x, w_gate_up, w_down, weights, *biases = leaves
    arguments = x, w_gate_up, w_down, weights, *ids, None, None, *biases
    options = "swiglu", list(GPT_OSS.numbers), False, True
    torch.library.opcheck(operators.fused_experts.op, (*arguments, *options))

    def layer(form, first, *t):
        return run(t, indices, activation=form, weights_first=first)

    for form, first in ((GPT_OSS, False), (of("silu"), True), (situ(4.0, None), False)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        mine, eager = compiled(form, first, *leaves), layer(form, first, *leaves)
        assert error(mine, eager) < 1e-6
        for one, other in zip(
            torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(eager.sum(), leaves),
            strict=True,
        ):  # fmt: skip
            assert error(one, other) < 1e-6
    pair = tuple(w.detach().clone() for w in w_gate_up.chunk(2, dim=1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    apart = [x, pair, *leaves[2:]]
    assert error(compiled(GPT_OSS, False, *apart), layer(GPT_OSS, False, *apart)) < 1e-6


BAD = [
    ({"activation": "relu"}, "activation: expected one of silu, gelu, situ, gelu_tanh, relu2"),
    ({"activation": ungated("silu")}, r"w_gate_up: expected shape \[5, 20, 24\] beside w_down"),
    ({"b_gate_up": torch.ones(5, 24)}, r"b_gate_up: expected shape \[5, 40\]"),
    ({"b_down": torch.ones(5, 24).half()}, "b_down: expected float32"),
    ({"w_gate_up": (torch.ones(5, 20, 24), torch.ones(5, 20, 23))}, "w3: expected shape"),
    ({"w_gate_up": (torch.ones(5, 20, 24),)}, "w_gate_up: expected one tensor or quantised"),
    ({"w_gate_up": (torch.ones(5, 9, 24),) * 2}, r"w_gate_up: expected shape \[5, 20, 24\]"),
]


# Numbers, where they are made
WRONG = [
    (lambda: Activation("swiglu"), "Activation: numbers: expected 5 of swiglu, got 0"),
    (lambda: of("swiglu"), "Activation: numbers: expected 5 of swiglu, got 0"),
    (lambda: Activation("silu", (1.0,)), "Activation: numbers: expected 0 of silu, got 1"),
    (lambda: situ(0.0), "situ: gate_bound: expected above 0 and finite, got 0"),
    (lambda: situ(math.inf), "situ: gate_bound: expected above 0 and finite"),
    (lambda: situ(4.0, -1.0), "situ: up_bound: expected above 0, got -1.0; None is no"),
    (lambda: swiglu(0.0), "swiglu: gate_limit: expected above 0, got 0"),
    (lambda: swiglu(math.nan), "swiglu: gate_limit: expected above 0, got nan"),
    (lambda: swiglu(alpha=math.nan), "swiglu: alpha: expected finite, got nan"),
    (lambda: swiglu(1.0, clamp="never"), "swiglu: clamp: expected one of before, after"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_numbers_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_calls(changes, message):
    (x, w_gate_up, w_down, weights, b_gate_up, b_down), indices = tensors()
    arguments = {
        "x": x, "w_gate_up": w_gate_up, "w_down": w_down, "weights": weights, "indices": indices,
        "b_gate_up": b_gate_up, "b_down": b_down,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=f"fused_experts: {message}"):
        fused_experts(**(arguments | changes))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("stacks", [1, 2])
def test_biases_of_composed_forms(stacks, first):
    """Against the twin in float64."""
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
