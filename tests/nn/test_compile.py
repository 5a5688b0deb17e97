# SPDX-License-Identifier: MIT
"""The layer under torch.compile, torch.export and torch.func: one graph, the same bits."""

import pytest
import torch
from torch.func import functional_call, grad

from tests.nn.parts import HIDDEN, TOP_K, layer

X = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2))
VALID = torch.arange(5) < torch.tensor([[3], [5]])


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def compiled(moe, **options):
    return torch.compile(moe, fullgraph=True, backend="aot_eager", **options)


def step(moe, run, *inputs):
    """Gradients, counts and losses of a training step."""
    moe.zero_grad()
    moe.reset_statistics()
    x = X.clone().requires_grad_()
    (run(x, *inputs).square().sum() + moe.auxiliary_loss()).backward()
    gradients = [x.grad, *(p.grad.clone() for p in moe.parameters())]
    return [*gradients, moe.tokens_per_expert.clone(), moe.auxiliary_loss().detach()]


def test_a_training_step_with_padding_is_one_graph():
    moe = layer(balance_coefficient=0.1, z_coefficient=0.01)
    expected = step(moe, moe, VALID)
    for mine, other in zip(step(moe, compiled(moe), VALID), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert expected[-2].sum() == 8 * TOP_K


def test_sizes_may_vary():
    moe = layer()
    run = compiled(moe, dynamic=True)
    for length in (3, 7, 2):
        x = X[:, :1].expand(2, length, HIDDEN) * length
        assert torch.equal(run(x), moe(x))


def test_autocast_in_a_graph():
    moe = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(moe)(X)
        assert y.dtype == torch.bfloat16 and torch.equal(y, moe(X))


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_stored_experts_in_a_graph_with_gradients(form):
    moe = layer()
    moe.experts = moe.experts.stored(form)
    expected = step(moe, moe)
    for mine, other in zip(step(moe, compiled(moe)), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [None, "int4"])
def test_export_keeps_the_state_and_takes_other_sizes(form):
    moe = layer().eval()
    if form:
        moe.experts = moe.experts.stored(form)
    length = torch.export.Dim("length", min=1, max=100)
    exported = torch.export.export(moe, (X,), dynamic_shapes={"x": {1: length}})
    assert exported.state_dict.keys() == moe.state_dict().keys()
    for x in (X, X[:, :2], X.repeat(1, 4, 1)):
        assert torch.equal(exported.module()(x), moe(x))


def test_gradients_by_torch_func():
    moe = layer(balance_coefficient=0.1)
    parameters = dict(moe.named_parameters())

    def loss(parameters):
        return functional_call(moe, parameters, X).square().sum() + moe.auxiliary_loss()

    ours = grad(loss)(parameters)
    assert int(moe.tokens_per_expert.sum()) == 10 * TOP_K
    moe.reset_statistics()
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for mine, other in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
