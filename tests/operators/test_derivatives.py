# SPDX-License-Identifier: MIT
"""First derivatives by torch.func are those by backward; second ones are right or refused by
name, also where the gradient that comes in is a constant."""

import pytest
import torch
from torch import Tensor

import kimi_ops
from kimi_ops import reference
from kimi_ops.reference import balance, fused_experts, grouped_gemm, permute, topk_gate  # noqa: F401

IDS = torch.tensor([[0, 1], [2, 0], [1, -1]], dtype=torch.int32)
PLAN = kimi_ops.permute_plan(IDS, 3)
ENDS = torch.tensor([2, 3, 5], dtype=torch.int32)
SIZES, ORDER = torch.tensor([2, 3]).int(), torch.tensor([1, 0]).int()
CHOSEN = torch.tensor([[0, 1], [2, 5], [1, 0], [3, 4]], dtype=torch.int32)


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


INT4 = kimi_ops.Int4GroupWeight.quantize(r(3, 5, 8))
STORED = [kimi_ops.Fp8BlockWeight.quantize(r(3, *shape)) for shape in ((16, 8), (8, 8))]
EXPERTS = [r(3, 4), r(3, 6, 4), r(3, 4, 3), r(3, 2)]

# name -> (function, inputs, its twin)
OPS = {
    "topk_gate": (
        lambda z: kimi_ops.topk_gate(z, 2).weights, [r(4, 6)],
        lambda z: reference.topk_gate.topk_gate(z, 2)[0],
    ),
    "topk_gate given": (
        lambda z: kimi_ops.topk_gate(z, ids=CHOSEN).weights, [r(4, 6)],
        lambda z: reference.topk_gate.topk_gate(z, ids=CHOSEN)[0],
    ),
    "gate_plan": (
        lambda z: kimi_ops.gate_plan(z, 2, score_function="softmax")[0].weights, [r(4, 6)],
        lambda z: reference.topk_gate.topk_gate(z, 2, "softmax")[0],
    ),
    "z_loss": (kimi_ops.z_loss, [r(4, 6)], reference.balance.z_loss),
    "sequence_balance_loss": (
        lambda z: kimi_ops.sequence_balance_loss(z, CHOSEN), [r(4, 6)],
        lambda z: reference.balance.sequence_balance_loss(z, CHOSEN),
    ),
    "permute": (
        lambda x: kimi_ops.permute(x, PLAN), [r(3, 4)],
        lambda x: reference.permute.permute(x, PLAN),
    ),
    "permute_weights": (
        lambda w: kimi_ops.permute_weights(w, PLAN), [r(3, 2)],
        lambda w: reference.permute.permute(
            w.reshape(-1, 1), PLAN._replace(row_map=PLAN.row_map.reshape(-1, 1))
        ).view(-1),
    ),
    "unpermute": (
        lambda y, w: kimi_ops.unpermute(y, PLAN, w), [r(6, 4), r(3, 2)],
        lambda y, w: reference.permute.unpermute(y, PLAN, w),
    ),
    "sort_chunks": (
        lambda x: kimi_ops.sort_chunks(x, SIZES, ORDER), [r(6, 4)],
        lambda x: reference.permute.sort_chunks(x, SIZES, ORDER),
    ),
    "grouped_gemm": (
        lambda a, b, c: kimi_ops.grouped_gemm(a, b, ENDS, bias=c), [r(6, 4), r(3, 4, 5), r(3, 5)],
        lambda a, b, c: reference.grouped_gemm.grouped_gemm(a, b, ENDS, c),
    ),
    "grouped_gemm_wgrad": (
        lambda a, dc: kimi_ops.grouped_gemm_wgrad(a, dc, ENDS), [r(6, 4), r(6, 5)],
        lambda a, dc: torch.stack([a[s:e].T @ dc[s:e] for s, e in ((0, 2), (2, 3), (3, 5))]),
    ),
    "quantised": (
        lambda a, c: kimi_ops.grouped_gemm(a, INT4, ENDS, bias=c), [r(6, 8), r(3, 5)],
        lambda a, c: reference.grouped_gemm.grouped_gemm(
            a, INT4.dequantize(a.dtype).mT, ENDS, c
        ),
    ),
    "fused_experts": (
        lambda *t: kimi_ops.fused_experts(*t, IDS), EXPERTS,
        lambda *t: reference.fused_experts.fused_experts(*t, IDS),
    ),
    "fused_experts recompute": (
        lambda *t: kimi_ops.fused_experts(*t, IDS, recompute=True, plan=PLAN), EXPERTS,
        lambda *t: reference.fused_experts.fused_experts(*t, IDS),
    ),
    "fused_experts stored": (
        lambda x, w: kimi_ops.fused_experts(x, *STORED, w, IDS), [r(3, 8), r(3, 2)],
        lambda x, w: reference.fused_experts.fused_experts(
            x, *(s.dequantize(x.dtype) for s in STORED), w, IDS
        ),
    ),
}  # fmt: skip


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def weighed(function):
    """A number that every result has its own part in, as a square: no gradient is a constant."""

    def total(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return (y.square() * torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape)).sum()

    return total


def gradients(function, inputs, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs), inputs, **options)


def test_torch_func_gives_what_backward_gives(op):
    function, inputs, _ = op
    expected = gradients(weighed(function), [x.clone().requires_grad_() for x in inputs])
    every = tuple(range(len(inputs)))
    ours = torch.func.grad(weighed(function), argnums=every)(*inputs)
    torch.testing.assert_close(ours, expected)
    value, pullback = torch.func.vjp(function, *inputs)
    torch.testing.assert_close(value, function(*inputs))
    ones = gradients(lambda *t: function(*t).sum(), [x.clone().requires_grad_() for x in inputs])
    torch.testing.assert_close(pullback(torch.ones_like(value)), ones)  # the transform is over


def second(function, inputs):
    """Gradients of a sum of the gradients' squares."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = gradients(weighed(function), leaves, create_graph=True)
    total = sum(g.square().sum() for g in first)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("transform", [False, True])
def test_second_derivatives_are_right_or_refused(op, transform):
    function, inputs, twin = op
    exact = second(twin, [x.double() for x in inputs])
    if transform:
        every = tuple(range(len(inputs)))

        def squares(*leaves: Tensor) -> Tensor:
            found = torch.func.grad(weighed(function), argnums=every)(*leaves)
            return sum(g.square().sum() for g in found)

        def ours():
            return torch.func.grad(squares, argnums=every)(*inputs)
    else:

        def ours():
            return second(function, inputs)

    try:
        found = ours()
    except RuntimeError as error:
        assert "once" in str(error), error
        return
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-4)


def test_in_float64_experts_have_second_derivatives():
    inputs = [x.double().requires_grad_() for x in EXPERTS]
    function = OPS["fused_experts"][0]
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    a, b, c = (x.double().requires_grad_() for x in OPS["grouped_gemm"][1])
    assert torch.autograd.gradgradcheck(OPS["grouped_gemm"][0], (a, b, c), fast_mode=True)
    assert torch.autograd.gradgradcheck(OPS["grouped_gemm"][2], (a, b, c), fast_mode=True)


def test_a_batch_of_gradients_is_refused(op):
    function, inputs, _ = op
    batch = [torch.stack([x, x]) for x in inputs]
    every = tuple(range(len(inputs)))
    with pytest.raises(NotImplementedError, match="got a batch of them by torch.vmap; take the"):
        torch.vmap(torch.func.grad(weighed(function), argnums=every))(*batch)
