# SPDX-License-Identifier: MIT
"""fused_experts with 384 experts, top 8: transformers' DeepseekV3MoE, products in fp64, bf16
emulation; NaN, skew, strides, repeats."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops import fused_experts, topk_gate
from kimi_ops.operators import fused_experts as operators

HALF = [torch.bfloat16, torch.float16]
NAMES = ("y", "dx", "d w_gate_up", "d w_down", "d weights")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Round(torch.autograd.Function):
    """A tensor of half precision between two ops: the value is rounded, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def experts_by_hand(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, indices: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Expert by expert in the dtype of x; with `dtype` every tensor that an op hands to the next
    is rounded to it, forward and backward. The weighted sum is not rounded between its slots."""

    def stored(t: Tensor) -> Tensor:
        return t if dtype is None else Round.apply(t, dtype)

    gate_up, down = w_gate_up.unbind(), w_down.unbind()
    pairs, outputs = [], []
    for expert in indices[indices >= 0].unique().tolist():
        t, k = (indices == expert).nonzero(as_tuple=True)
        gate, up = stored(stored(x[t]) @ gate_up[expert].t()).chunk(2, dim=1)
        hidden = stored(gate * torch.sigmoid(gate) * up)
        pairs.append(torch.stack((t, k)))
        outputs.append(stored(hidden @ down[expert].t()))
    slots = x.new_zeros(*indices.shape, x.shape[1])
    slots = slots.index_put(tuple(torch.cat(pairs, dim=1)), torch.cat(outputs))
    return stored((weights[..., None] * slots).sum(1))


def tensors(tokens, experts, k, hidden, width, dtype, skew="random"):
    logits = torch.randn(tokens, experts)
    if skew == "hot":
        logits[: tokens // 2, :k] += 10
    gate = topk_gate(logits, k, scaling_factor=2.827)
    return [
        torch.randn(tokens, hidden).to(dtype),
        (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, width) / width**0.5).to(dtype),
        gate.weights,
        gate.indices,
    ]


def value_and_gradients(function, floats, dy) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in floats]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@functools.lru_cache(maxsize=4)
def known_case(device, tokens, experts, k, hidden, width, dtype, skew="random"):
    """Arguments on a device, what they give in fp64, and the errors of the emulation in `dtype`:
    the same for every engine there, so computed once."""
    *floats, indices = tensors(tokens, experts, k, hidden, width, dtype, skew)
    dy = torch.randn(tokens, hidden).to(dtype)
    exact = value_and_gradients(
        lambda *t: experts_by_hand(*t, indices), [t.double() for t in floats], dy
    )
    stored = [torch.float32 if name == "d weights" else dtype for name in NAMES]
    emulated = value_and_gradients(
        lambda *t: experts_by_hand(*t, indices, dtype), [t.float() for t in floats], dy
    )
    errors = [error(e.to(d), t) for e, d, t in zip(emulated, stored, exact, strict=True)]
    return floats, indices, dy, exact, dict(zip(NAMES, errors, strict=True))


@pytest.mark.parametrize("tokens", [1, 48])
def test_the_moe_block_of_transformers(gemm_engine, tokens):
    """384 experts, top 8, random bias, forward and every gradient to 1e-6."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=128, moe_intermediate_size=64,
        n_routed_experts=40 if gemm_engine.slow else 384, num_experts_per_tok=8,
        n_group=1, topk_group=1, n_shared_experts=1, routed_scaling_factor=2.827,
        norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    moe = DeepseekV3MoE(config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        moe.gate.e_score_correction_bias.normal_(0, 0.1)
    x, dy = torch.randn(tokens, 128), torch.randn(tokens, 128)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = moe(a[None])[0]
    theirs = [y, *torch.autograd.grad(y, [a, *moe.parameters()], dy)]
    gate = topk_gate(
        F.linear(b, moe.gate.weight), 8,
        expert_bias=moe.gate.e_score_correction_bias, scaling_factor=2.827,
    )  # fmt: skip
    z = fused_experts(
        b, moe.experts.gate_up_proj, moe.experts.down_proj, gate.weights, gate.indices
    )
    z = z + moe.shared_experts(b)
    ours = [z, *torch.autograd.grad(z, [b, *moe.parameters()], dy)]
    names = ["y", "dx", *(f"d {name}" for name, _ in moe.named_parameters())]
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert error(mine, other) < 1e-6, name


@pytest.mark.parametrize("skew", ["random", "hot"])
def test_float32_against_float64(gemm_engine, skew):
    experts, hidden = (40, 96) if gemm_engine.slow else (384, 256)
    floats, indices, dy, exact, _ = known_case(
        gemm_engine.device, 64, experts, 8, hidden, 96, torch.float32, skew
    )
    ours = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    for name, mine, truth in zip(NAMES, ours, exact, strict=True):
        assert error(mine, truth) < 1e-6, name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "tokens,experts,k,hidden,width", [(48, 384, 8, 128, 64), (40, 8, 2, 1024, 256)]
)
def test_errors_are_those_of_emulation(gemm_engine, dtype, tokens, experts, k, hidden, width):
    """Operands in half precision, sums in fp32, the same tensors rounded: at most 1.25 times the
    error of that."""
    if gemm_engine.slow:
        experts, hidden = min(experts, 40), min(hidden, 256)
    floats, indices, dy, exact, errors = known_case(
        gemm_engine.device, tokens, experts, k, hidden, width, dtype
    )
    ours = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    for name, mine, truth in zip(NAMES, ours, exact, strict=True):
        assert mine.dtype == (torch.float32 if name == "d weights" else dtype)
        assert error(mine, truth) <= 1.25 * errors[name], name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_nan_stays_with_its_token(gemm_engine, dtype):
    *floats, indices = tensors(24, 16, 4, 96, 40, dtype)
    dy = torch.randn(24, 96).to(dtype)
    clean = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    token = 11
    floats[0][token, 3], dy[token, 5] = torch.nan, torch.nan
    y, dx, d_gate_up, d_down, d_weights = value_and_gradients(
        lambda *t: fused_experts(*t, indices), floats, dy
    )
    others = torch.arange(24) != token
    for mine, before in ((y, clean[0]), (dx, clean[1]), (d_weights, clean[4])):
        assert mine[token].isnan().all() and torch.equal(mine[others], before[others])
    untouched = [e for e in range(16) if e not in indices[token].tolist()]
    assert torch.equal(d_gate_up[untouched], clean[2][untouched])
    assert torch.equal(d_down[untouched], clean[3][untouched])
    assert all(d_down[e].isnan().any() for e in indices[token].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_weight_of_nan_stays_with_its_expert(gemm_engine, dtype):
    """An expert whose matrices hold NaN reaches the tokens that chose it and no others."""
    *floats, indices = tensors(24, 16, 2, 96, 40, dtype)
    before = fused_experts(*floats, indices)
    floats[1][5], floats[2][5] = torch.nan, torch.nan
    y = fused_experts(*floats, indices)
    chose = (indices == 5).any(1)
    assert y[chose].isnan().all() and torch.equal(y[~chose], before[~chose])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("experts", [1, 384])
def test_all_tokens_to_one_expert(gemm_engine, dtype, experts):
    *floats, indices = tensors(70, experts, 1, 64, 24, dtype)
    indices.fill_(experts // 2)
    dy = torch.randn(70, 64).to(dtype)
    ours = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    exact = value_and_gradients(
        lambda *t: experts_by_hand(*t, indices), [t.double() for t in floats], dy
    )
    for name, mine, truth in zip(NAMES, ours, exact, strict=True):
        bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.3e-3}[dtype]
        assert error(mine, truth) < bound, name


@pytest.mark.parametrize("hidden", [1, 7, 129])
@pytest.mark.parametrize("width", [1, 7, 129])
def test_awkward_sizes_with_dropped_slots(gemm_engine, hidden, width):
    *floats, indices = tensors(19, 12, 3, hidden, width, torch.float32)
    indices[torch.rand(indices.shape) < 0.3] = -1
    indices[4] = -1
    dy = torch.randn(19, hidden)
    ours = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    exact = value_and_gradients(
        lambda *t: experts_by_hand(*t, indices), [t.double() for t in floats], dy
    )
    for name, mine, truth in zip(NAMES, ours, exact, strict=True):
        assert error(mine, truth) < 2e-6, name
    assert not ours[0][4].any() and not ours[1][4].any() and not ours[4][indices < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_strides_of_inputs_and_gradients(gemm_engine, dtype):
    *floats, indices = tensors(30, 12, 3, 64, 40, dtype)
    dy = torch.randn(30, 64).to(dtype)
    expected = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    strided = [t.mT.contiguous().mT for t in (*floats, dy)]
    ours = value_and_gradients(
        lambda *t: fused_experts(*t, indices.t().contiguous().t()), strided[:-1], strided[-1]
    )
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.3e-3}[dtype]
    for name, mine, other in zip(NAMES, ours, expected, strict=True):
        assert error(mine, other) < bound, name
    ones = torch.ones((), dtype=dtype).expand(30, 64)
    one = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, ones)
    whole = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, torch.ones_like(dy))
    assert all(torch.equal(mine, other) for mine, other in zip(one, whole, strict=True))


@pytest.mark.parametrize("wanted", ["x", "w_gate_up", "w_down", "weights"])
def test_each_gradient_alone_is_that_of_all(gemm_engine, wanted):
    *floats, indices = tensors(30, 12, 3, 64, 40, torch.float32)
    dy = torch.randn(30, 64)
    every = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    place = ("x", "w_gate_up", "w_down", "weights").index(wanted)
    floats[place].requires_grad_()
    (alone,) = torch.autograd.grad(fused_experts(*floats, indices), floats[place], dy)
    assert torch.equal(alone, every[place + 1])


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("asked", [(0,), (1, 2), (2,), (0, 3), (0, 1, 2, 3)])
def test_gradients_that_nobody_asks_for_are_not_computed(monkeypatch, asked, leaves):
    *floats, indices = tensors(30, 12, 3, 64, 40, torch.float32)
    dy = torch.randn(30, 64)
    every = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    computed, real = [], operators.fused_experts_backward

    def backward(*arguments: Any) -> Any:
        computed.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(operators, "fused_experts_backward", backward)
    inputs = [t.detach().requires_grad_() for t in floats]
    inputs = inputs if leaves else [t * 1 for t in inputs]
    gradients = torch.autograd.grad(fused_experts(*inputs, indices), [inputs[i] for i in asked], dy)
    assert computed == [[i in asked for i in range(4)] + [False, False]]  # no biases
    assert all(torch.equal(g, every[i + 1]) for i, g in zip(asked, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_twenty_repeats_have_the_same_bits(gemm_engine, dtype):
    *floats, indices = tensors(64, 24, 4, 96, 40, dtype, "hot")
    dy = torch.randn(64, 96).to(dtype)
    first = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
    for _ in range(2 if gemm_engine.slow else 19):
        again = value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("skew", ["random", "hot"])
def test_thread_counts_have_the_same_bits(cpu_engine, two_thread_counts, dtype, skew):
    *floats, indices = tensors(96, 24, 4, 200, 72, dtype, skew)
    dy = torch.randn(96, 200).to(dtype)
    results = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        results.append(value_and_gradients(lambda *t: fused_experts(*t, indices), floats, dy))
    for name, one, several in zip(NAMES, *results, strict=True):
        assert torch.equal(one, several), name


class Recorder(TorchDispatchMode):
    """The calls of this library's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kimi_ops":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    """Of every operator behind the op and its gradient, as it is called."""
    *floats, indices = tensors(20, 6, 2, 24, 16, dtype)
    leaves = [t.clone().requires_grad_() for t in floats]
    with Recorder() as recorder:
        y = fused_experts(*leaves, indices)
        torch.autograd.grad(y.sum(), leaves)
        with torch.no_grad():
            fused_experts(*floats, indices)
    names = {func._schema.name.removeprefix("kimi_ops::") for func, _ in recorder.calls}
    assert names & {"fused_experts", "fused_experts_forward"}, names
    for func, args in recorder.calls:
        torch.library.opcheck(func, tuple(t.detach() if isinstance(t, Tensor) else t for t in args))
    op = torch.ops.kimi_ops.fused_experts.default
    forward = next(args for func, args in recorder.calls if func is op)
    torch.library.opcheck(op, (*leaves, *forward[4:]))


@pytest.mark.parametrize("activation", ["silu", "gelu", "situ"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_full_graph_with_dynamic_tokens(activation, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests

    def layer(x, w_gate_up, w_down, logits):
        gate = topk_gate(logits, 2)
        y = fused_experts(
            torch.tanh(x), w_gate_up, w_down, gate.weights, gate.indices, activation=activation
        )
        return (x + y).square().sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 17, 40):
        x, w_gate_up, w_down, _, _ = tensors(tokens, 6, 2, 24, 16, torch.float32)
        first = [t.requires_grad_() for t in (x, w_gate_up, w_down, torch.randn(tokens, 6))]
        second = [t.detach().clone().requires_grad_() for t in first]
        a, b = compiled(*first), layer(*second)
        a.backward()
        b.backward()
        assert error(a, b) < 1e-6
        for mine, other in zip(first, second, strict=True):
            assert error(mine.grad, other.grad) < 1e-6
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0
