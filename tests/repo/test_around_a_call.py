# SPDX-License-Identifier: MIT
"""What torch's machinery around a call sees of every differentiable op: views, modes, subclasses,
transforms, version counters and saved tensors."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kimi_ops
from tests.repo import messages

# op -> the arguments that gradients flow to
OPS = {
    "topk_gate": ["logits"],
    "gate_plan": ["logits"],
    "dense_gate": ["logits"],
    "sequence_balance_loss": ["logits"],
    "z_loss": ["logits"],
    "permute": ["x"],
    "permute_weights": ["weights"],
    "unpermute": ["y", "weights"],
    "sort_chunks": ["x"],
    "grouped_gemm": ["a", "b", "bias"],
    "fused_experts": ["x", "w_gate_up", "w_down", "weights"],
}


class Call:
    """An op as a function of its differentiable arguments, to the first result."""

    def __init__(self, op):
        self.op = op
        self.arguments = messages.good()[op]
        more = {
            "unpermute": {"weights": messages.f(4, 2)},
            "grouped_gemm": {"bias": messages.f(2, 5)},
        }
        self.arguments |= more.get(op, {})
        # numbers that no sum of theirs hides, on top of small whole ones
        self.inputs = [self.arguments[name] + 0.125 for name in OPS[op]]

    def results(self, *inputs):
        found = getattr(kimi_ops, self.op)(
            **self.arguments | dict(zip(OPS[self.op], inputs, strict=True))
        )
        if not isinstance(found, tuple):
            return (found,)
        return found[0] if isinstance(found[0], tuple) else found

    def __call__(self, *inputs):
        return self.results(*inputs)[0]

    def wanted(self):
        return [x.clone().requires_grad_() for x in self.inputs]


@pytest.fixture(params=OPS)
def call(request):
    return Call(request.param)


def same(ours, theirs):
    return torch.equal(ours.detach(), theirs.detach())


@pytest.mark.parametrize("view", ["negative", "offset", "step", "expanded", "parameter"])
def test_views_are_read_as_what_they_show(call, view):
    seen = []
    for x in call.inputs:
        if view == "negative":
            seen.append(torch._neg_view(-x))
        elif view == "offset":
            seen.append(torch.cat([x.flatten().new_zeros(1), x.flatten()])[1:].view(x.shape))
        elif view == "step":
            seen.append(x.repeat_interleave(2, -1)[..., ::2])
        elif view == "expanded":
            seen.append(x[:1].expand(x.shape))
        else:
            seen.append(torch.nn.Parameter(x))
    dense = call(*(x.clone(memory_format=torch.contiguous_format) for x in seen))
    if view == "step" and call.op == "fused_experts":  # sums of matrices without dense rows
        torch.testing.assert_close(call(*seen), dense)
    else:
        assert same(call(*seen), dense)


def test_gradients_may_be_expanded(call):
    inputs, dense = call.wanted(), call.wanted()
    call(*inputs).sum().backward()
    y = call(*dense)
    y.backward(torch.ones_like(y))
    for x, other in zip(inputs, dense, strict=True):
        assert same(x.grad, other.grad)


def test_modes_without_gradients(call):
    expected = call(*call.inputs)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            result = call(*(x.clone() for x in call.wanted()))
        assert same(result, expected) and not result.requires_grad


def test_gradients_are_asked_of_floats_alone(call):
    for result in call.results(*call.wanted()):
        assert result.requires_grad == result.is_floating_point()


def test_subclasses_come_out_as_they_went_in(call):
    class Subclass(torch.Tensor):
        pass

    result = call(*(x.as_subclass(Subclass) for x in call.inputs))
    assert type(result) is Subclass and same(result.as_subclass(torch.Tensor), call(*call.inputs))


def test_fake_tensors_have_the_shapes_of_real_ones(call):
    real = call.results(*call.inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call.results(*map(mode.from_tensor, call.inputs))
    for mine, other in zip(fake, real, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride())


def test_dispatch_modes_see_the_operator(call):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Log():
        call(*call.inputs)
    assert any(name.startswith("kimi_ops.") for name in seen)


def test_graphs_hold_the_operator(call):
    inputs = call.inputs
    graph = make_fx(call)(*inputs)
    assert "torch.ops.kimi_ops." in graph.code and same(graph(*inputs), call(*inputs))


def test_vmap_is_a_loop(call):
    stacks = [torch.stack([x, x.flip(0)]) for x in call.inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a loop: torch says that it is slow
        result = torch.vmap(call)(*stacks)
    for row, *inputs in zip(result, *stacks, strict=True):
        assert same(row, call(*inputs))


def test_changed_inputs_are_refused_in_the_backward(call):
    inputs = call.wanted()
    y = call(*inputs)
    with torch.no_grad():
        for x in inputs:
            x.add_(1)
    if call.op in ("permute", "permute_weights", "sort_chunks"):  # which need none of them
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoints_and_hooks_on_saved_tensors(call):
    plain, again, packed = call.wanted(), call.wanted(), []
    y = call(*plain)
    y.square().sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        call(*again)
    assert packed
    checkpoint(call, *again, use_reentrant=False).square().sum().backward()
    for x, other in zip(plain, again, strict=True):
        assert same(x.grad, other.grad)


def test_no_more_is_computed_than_is_asked(call):
    """A gradient for each subset of one input, equal to that of all together."""
    together = call.wanted()
    call(*together).square().sum().backward()
    for index, x in enumerate(together):
        inputs = [y.detach() for y in call.inputs]
        inputs[index] = inputs[index].clone().requires_grad_()
        call(*inputs).square().sum().backward()
        assert same(inputs[index].grad, x.grad)


def test_written_tensors_tell_their_version():
    counts, a, dc, b = (
        messages.i(*range(16)),
        messages.f(6, 8),
        messages.f(6, 5),
        messages.f(2, 8, 5),
    )
    offsets, grown = messages.i(2, 6), []
    clip = messages.good()["ops.clip_rows_"]
    clip = {name: value for name, value in clip.items() if name != "weights"}
    for write, target in (
        (lambda x: kimi_ops.update_expert_bias_(x, counts, 0.1), messages.f(16)),
        (lambda x: kimi_ops.grouped_gemm(a, b, offsets, out=x), messages.f(6, 5)),
        (lambda x: kimi_ops.grouped_gemm_wgrad(a, dc, offsets, out=x), messages.f(2, 8, 5)),
        (lambda x: torch.ops.kimi_ops.clip_rows_([x], **clip), messages.f(12, 3)),
        (
            lambda x: torch.ops.kimi_ops.muon_momentum_([x], [x], 0.9, True, False, None, []),
            messages.f(4, 6),
        ),
    ):
        before = target._version
        write(target)
        grown.append(target._version - before)
    assert all(step >= 1 for step in grown), grown


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_stops_a_program_is_no_bad_argument(error):
    class Stopping:
        def __index__(self):
            raise error

        __bool__ = __index__

    with pytest.raises(error):
        kimi_ops.topk_gate(torch.zeros(1, 4), k=Stopping())
    with pytest.raises(error):
        kimi_ops.topk_gate(torch.zeros(1, 4), k=2, renormalize=Stopping())


def test_what_an_argument_raises_is_told():
    class Broken:
        def __index__(self):
            raise ValueError("no whole number")

    with pytest.raises(TypeError, match="topk_gate: k: expected an int: no whole number"):
        kimi_ops.topk_gate(torch.zeros(1, 4), k=Broken())
