# SPDX-License-Identifier: MIT
"""The way of a tensor into the native functions: which calls go straight in, and which are for
torch's modes, subclasses, tracers and transforms to see."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import kimi_ops
from kimi_ops import _native
from kimi_ops.operators.registry import Operator
from tests.operators.calls import CALLS, OFFSETS, PLAN, f, flat, i, same


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """A tensor whose data is another's; it sees every operator."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        args, kwargs = tree_map(
            lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return tree_map(
            lambda x: cls(x) if isinstance(x, torch.Tensor) else x, function(*args, **kwargs)
        )


# ---- who sees a call


@pytest.mark.parametrize("mode", [Dispatched, Called])
def test_modes_see_the_operator_of_every_call(call, mode):
    function, make = call
    expected = function(*make())
    with mode() as watching:
        result = function(*make())
    assert any("kimi_ops" in name for name in watching.seen) and same(result, expected)


def test_tensors_that_wrap_others_see_the_operator(call):
    function, make = call
    expected = function(*make())
    Wrapper.seen.clear()
    result = function(*map(Wrapper, make()))
    assert any("kimi_ops" in name for name in Wrapper.seen)
    for mine, other in zip(flat(result), flat(expected), strict=True):
        assert same(mine.inner if isinstance(mine, Wrapper) else mine, other)


def test_a_default_device_does_not_watch(call, monkeypatch):
    function, make = call
    inputs = make()
    expected = function(*[x.clone() for x in inputs])

    def refuse(self, arguments):
        raise AssertionError(f"{self.name} went to the dispatcher")

    monkeypatch.setattr(Operator, "_dispatch", refuse)
    assert same(function(*[x.clone() for x in inputs]), expected)
    with torch.device("cpu"):
        assert same(function(*[x.clone() for x in inputs]), expected)
        with Called(), pytest.raises(AssertionError, match="went to the dispatcher"):
            function(*inputs)
    torch.set_default_device("cpu")
    try:
        assert same(function(*inputs), expected)
    finally:
        torch.set_default_device(None)


def test_shapes_alone_never_reach_a_kernel(call):
    function, make = call
    real = flat(function(*make()))
    for fake in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if fake:
                mode = FakeTensorMode(allow_non_fake_inputs=True)
                inputs = [mode.from_tensor(x) for x in make()]
            else:
                inputs = [x.to("meta") for x in make()]
                if function in (CALLS[n][0] for n in ("permute", "unpermute", "grouped_gemm",
                                                      "grouped_gemm_out", "wgrad_accumulate",
                                                      "quantised")):  # fmt: skip
                    continue  # the plan beside them has values
            results = flat(function(*inputs))
        for mine, other in zip(results, real, strict=True):
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
            assert mine.device.type == ("cpu" if fake else "meta")


@pytest.mark.parametrize("native", ["direct", "eager"])
def test_the_native_functions_refuse_tensors_without_memory(native):
    module = _native._C if native == "direct" else _native._C.eager
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = torch.zeros(2, 4)
    if native == "eager":
        for x in (fake, torch.zeros(2, 4, device="meta")):
            assert module.z_loss(x, 1.0, None) == _native.WATCHED
        return
    with pytest.raises(
        TypeError, match=r"^z_loss: logits: expected a tensor with memory, got Fake"
    ):
        module.z_loss(fake, 1.0, None)
    for x in (torch.zeros(2, 4, device="meta"), torch.eye(4).to_sparse()):
        with pytest.raises(TypeError, match=r"^z_loss: logits: expected a dense tensor in the mem"):
            module.z_loss(x, 1.0, None)


def test_a_sparse_second_tensor_is_refused():
    with pytest.raises(TypeError, match=r"^grouped_gemm: offsets: expected a dense tensor in the"):
        kimi_ops.grouped_gemm(f(6, 8), f(2, 8, 5), OFFSETS.to_sparse())


def test_lazily_conjugated_rows_travel_conjugated():
    x = torch.complex(f(4, 3), f(4, 3) + 1)
    assert torch.equal(kimi_ops.permute(x.conj(), PLAN), kimi_ops.permute(x, PLAN).conj())
    imaginary = x.conj().imag  # lazily negated
    assert imaginary.is_neg() and same(kimi_ops.z_loss(imaginary), kimi_ops.z_loss(-x.imag))


def test_lazily_negated_ids_are_negated():
    ids = torch._neg_view(i([1, 0], [0, 1]).neg())  # shows 1, 0; memory holds -1, 0
    assert kimi_ops.permute_plan(ids, 2).tokens_per_expert.tolist() == [2, 2]


def test_zeros_without_memory_are_zeros():
    assert same(
        kimi_ops.z_loss(torch._efficientzerotensor((2, 4))), kimi_ops.z_loss(torch.zeros(2, 4))
    )


def test_messages_hold_no_stack_of_torch():
    with pytest.raises(TypeError) as refused:
        _native._C.z_loss(torch.zeros(2, 4, device="meta"), 1.0, None)
    assert "frame #" not in str(refused.value)


def test_a_sparse_first_tensor_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match=r"^topk_gate: logits: expected"):
        kimi_ops.topk_gate(torch.eye(4).to_sparse(), 2)


# ---- tracers and transforms


# jit knows neither functions of a quantised weight nor operators that only write to a list
@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("quantised", "muon_update")])
def test_traces_hold_the_operator(name):
    function, make = CALLS[name]
    expected = flat(function(*make()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda *x: tuple(flat(function(*x))), make(), check_trace=False)
    assert "kimi_ops::" in str(traced.graph)
    assert same(traced(*make()), expected)


def test_graphs_of_every_call(call):
    function, make = call
    graph = make_fx(lambda *x: flat(function(*x)))(*make())
    assert "torch.ops.kimi_ops." in graph.code and same(graph(*make()), function(*make()))


def test_transforms_are_right_or_refused():
    x = f(4, 16)
    functional = torch.func.functionalize(lambda x: kimi_ops.z_loss(x * 1))
    assert same(functional(x), kimi_ops.z_loss(x))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(kimi_ops.z_loss, (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"^z_loss: expected reverse-mode"):
            kimi_ops.z_loss(dual)
        assert same(kimi_ops.z_loss(x), functional(x))  # without a tangent: as ever


def test_stored_weights_beside_float64_are_refused_by_name():
    data, scale = torch.zeros(2, 5, 8).to(torch.float8_e4m3fn), torch.ones(2, 1, 1)
    arguments = torch.zeros(6, 8).double(), data, scale, i(2, 6), None, torch.float64
    with pytest.raises(TypeError, match="grouped_gemm: a: .*got float64"):
        torch.ops.kimi_ops.quantized_gemm(*arguments)
