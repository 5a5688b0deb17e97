# SPDX-License-Identifier: MIT
"""What calls leave behind: gradients, results of several threads, references and memory."""

import contextlib
import gc
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kimi_ops
from kimi_ops import _native
from kimi_ops.operators import grouped_gemm
from kimi_ops.reference import topk_gate as reference_gate
from tests.operators.calls import CALLS, OFFSETS, PLAN, f, i, same
from tests.repo import messages


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


# ---- gradients


def test_gradients_are_those_of_the_reference():
    x, other = f(4, 16).requires_grad_(), torch.nn.Parameter(f(4, 16))
    kimi_ops.topk_gate(x, 2).weights.square().sum().backward()
    reference_gate.topk_gate(other, 2)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_written_results_record_no_gradient():
    for out, function, make in (
        (f(6, 5), *CALLS["grouped_gemm_out"]),
        (f(2, 8, 5), *CALLS["wgrad_accumulate"]),
    ):
        inputs = [x.requires_grad_() for x in make()[1:]]
        with torch.no_grad():
            assert not function(out, *inputs).requires_grad
        with torch.inference_mode():
            assert not function(out.clone(), *inputs).requires_grad
    bias = f(16).requires_grad_()
    assert kimi_ops.update_expert_bias_(bias, i(*range(16)), 0.1) is bias and bias.is_leaf


def test_a_second_derivative_is_refused_by_name():
    x = f(4, 16).requires_grad_()
    (grad,) = torch.autograd.grad(kimi_ops.z_loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^z_loss_backward: expected to be differentiated once"):
        grad.sum().backward()


def test_gradients_asked_twice_and_of_unused_tensors():
    a, b = f(6, 8).requires_grad_(), f(2, 8, 5).requires_grad_()
    unused, seen = f(3).requires_grad_(), []
    a.register_hook(lambda grad: seen.append(grad.clone()))
    c = kimi_ops.grouped_gemm(a, b, OFFSETS).square().sum()
    first = torch.autograd.grad(c, [a, b, unused], retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(c, [a, b])
    assert first[2] is None and same(first[:2], second) and same(seen, [first[0]] * 2)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(c, [a, b])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_experts(reentrant):
    plain, again = (
        [x.requires_grad_(x.is_floating_point()) for x in CALLS["fused_experts"][1]()]
        for _ in range(2)
    )
    kimi_ops.fused_experts(*plain).square().sum().backward()
    checkpoint(kimi_ops.fused_experts, *again, use_reentrant=reentrant).square().sum().backward()
    for x, other in zip(plain[:4], again[:4], strict=True):
        assert torch.equal(x.grad, other.grad)


def test_rows_of_float8_do_not_lose_a_gradient():
    x = messages.fp8(4, 6).requires_grad_()
    assert kimi_ops.permute(x, PLAN).requires_grad


# ---- threads


def test_calls_from_several_threads(call, two_thread_counts):
    function, make = call
    expected, wrong = function(*make()), []

    def work():
        for _ in range(20):
            if not same(function(*make()), expected):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in two_thread_counts * 4:  # torch's number is followed, whenever it changes
        torch.set_num_threads(number)
        function(*make())
        assert _native._C.num_threads() == number
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what calls leave behind


def _memory():
    """Bytes of this process that lie in memory (Linux)."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_neither_success_nor_failure_keeps_anything(call):
    function, make = call
    inputs = make()

    def attempt():
        function(*inputs)
        for bad in range(len(inputs)):
            for replace in (lambda x: x[None], lambda x: x.to_sparse(), lambda x: x[:0]):
                wrong = [replace(x) if n == bad else x for n, x in enumerate(inputs)]
                with contextlib.suppress(TypeError, ValueError, RuntimeError):
                    function(*wrong)
            with pytest.raises((TypeError, AttributeError)):
                function(*inputs[:bad], "no tensor", *inputs[bad + 1 :])

    attempt()
    gc.collect()
    counts, objects = [sys.getrefcount(x) for x in inputs], len(gc.get_objects())
    for _ in range(200):
        attempt()
    gc.collect()
    assert [sys.getrefcount(x) for x in inputs] == counts
    assert len(gc.get_objects()) - objects < 200


def test_memory_of_outputs_and_copies_comes_back():
    x = torch.zeros(2 << 20, 2).mT  # 16 MiB, copied by a call; the first output is as large
    plan = kimi_ops.permute_plan(torch.zeros(2, 1, dtype=torch.int32), 1)
    before = _memory()
    for _ in range(50):
        kimi_ops.permute(x, plan)
        with pytest.raises(ValueError):
            kimi_ops.unpermute(x, plan, torch.zeros(3, 1))
    assert _memory() - before < 200 << 20, "50 outputs alone are 800 MiB"


def test_checks_of_values_do_not_hang_on_the_environment_on_a_cpu(monkeypatch):
    for asked in ("0", "1", ""):
        monkeypatch.setenv("KIMI_OPS_CHECK", asked)
        with pytest.raises(ValueError, match=r"^permute_plan: indices"):
            kimi_ops.permute_plan(i([9]), 4)
        with pytest.raises(ValueError, match=r"^grouped_gemm: offsets"):
            grouped_gemm.grouped_gemm(f(6, 8), f(2, 8, 5), i(5, 4), None, torch.float32, None)
        with pytest.raises(ValueError, match=r"^fused_experts: indices"):
            kimi_ops.fused_experts(*CALLS["fused_experts"][1]()[:4], i([5, 0]).expand(4, 2))


def test_engines_take_the_same_way(engine):
    """Empty tensors, strided ones, and gradients."""
    empty = kimi_ops.topk_gate(torch.zeros(0, 16, device=engine.device), 2)
    assert empty.weights.shape == (0, 2) and empty.tokens_per_expert.sum() == 0
    a, b = f(6, 8).to(engine.device), f(2, 8, 5).to(engine.device)
    offsets = i(0, 6).to(engine.device)  # the first group has no rows
    wide = a.repeat_interleave(2, 0)[::2].requires_grad_()
    c = kimi_ops.grouped_gemm(wide, b, offsets)
    c.sum().backward()
    torch.testing.assert_close(c, a @ b[1])
    torch.testing.assert_close(wide.grad, b[1].sum(1).expand(6, 8))
    with torch.no_grad():
        assert kimi_ops.grouped_gemm(wide[:0], b, offsets * 0).shape == (0, 5)
