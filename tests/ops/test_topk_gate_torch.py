# SPDX-License-Identifier: MIT
"""topk_gate as a citizen of torch: oracle of transformers, opcheck, compile, bad input."""

import threading

import numpy
import pytest
import torch

import kimi_ops
from kimi_ops import topk_gate


@pytest.mark.parametrize(
    "experts,k,groups,topk_groups", [(384, 8, 1, 1), (256, 8, 8, 4), (64, 6, 1, 1)]
)
def test_transformers_router(experts, k, groups, topk_groups):
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = deepseek.DeepseekV3Config(
        hidden_size=128, n_routed_experts=experts, num_experts_per_tok=k, n_group=groups,
        topk_group=topk_groups, routed_scaling_factor=2.827, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    router = deepseek.DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_(0, 0.1)
        router.e_score_correction_bias.normal_(0, 0.05)
        logits, weights, ids = router(torch.randn(1, 500, 128))
        gate = topk_gate(
            logits.view(-1, experts), k, expert_bias=router.e_score_correction_bias,
            num_groups=groups, topk_groups=topk_groups, scaling_factor=2.827,
        )  # fmt: skip
    ids, order = ids.view(-1, k).sort()
    ours, our_order = gate.indices.long().sort()
    assert torch.equal(ours, ids)
    torch.testing.assert_close(
        gate.weights.gather(1, our_order), weights.view(-1, k).gather(1, order), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    logits = torch.randn(12, 32).to(dtype).requires_grad_(requires_grad)
    bias, valid = torch.randn(32), torch.arange(12) > 2
    op = torch.ops.kimi_ops.topk_gate.default
    torch.library.opcheck(op, (logits, 4, "sigmoid", bias, 4, 2, 2, True, 2.5, valid, "scores"))
    plain = torch.ops.kimi_ops.topk_gate_forward.default  # taken where no gradient is wanted
    torch.library.opcheck(
        plain, (logits.detach(), 4, "sigmoid", bias, 4, 2, 2, True, 2.5, valid, "scores")
    )
    torch.library.opcheck(
        op, (logits.detach()[:, ::2], 4, "softmax", None, 1, 1, 2, False, 1.0, None, "logits")
    )
    given = torch.ops.kimi_ops.topk_gate_given.default
    ids = torch.randint(-1, 33, (12, 4), dtype=torch.int32)
    torch.library.opcheck(given, (logits, ids, "softmax", True, 2.5, valid))
    backward = torch.ops.kimi_ops.topk_gate_backward.default
    gate = topk_gate(logits, 4)
    grad = torch.randn(4, 12).t()
    torch.library.opcheck(backward, (grad, logits.detach(), gate.indices, "sigmoid", True, 2.5))


def test_compile_full_graph_with_dynamic_tokens():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests

    def loss(logits, bias):
        gate = topk_gate(logits * 1.5, 4, expert_bias=bias, scaling_factor=2.827)
        return (gate.weights * gate.indices).sum(), gate.tokens_per_expert

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    bias = torch.randn(24)
    for tokens in (3, 17, 40):
        a = torch.randn(tokens, 24, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        (x, counts), (y, want) = compiled(a, bias), loss(b, bias)
        x.backward()
        y.backward()
        assert torch.equal(x, y) and torch.equal(counts, want) and torch.equal(a.grad, b.grad)
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0


def test_inductor_with_dynamic_tokens_and_strided_rows():
    torch._dynamo.reset()

    def route(x):
        gate = topk_gate((x * 2)[:, 3:35], 4)
        return gate.weights * 3, gate.indices

    compiled = torch.compile(route, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x = torch.randn(tokens, 40)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), route(x), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph_on_a_side_stream_follows_new_routing():
    logits = torch.randn(64, 384, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        topk_gate(logits, 8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=side):
        gate = topk_gate(logits, 8)
    logits.copy_(torch.randn(64, 384))
    graph.replay()
    torch.cuda.synchronize()
    want = topk_gate(logits.cpu(), 8)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gate, want, strict=True))


def test_derivatives_beyond_the_first_are_refused_not_zero():
    logits = torch.randn(3, 8, requires_grad=True)
    loss = topk_gate(logits, 2).weights.square().sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(
        RuntimeError, match="topk_gate_backward: expected to be differentiated once"
    ):
        grad.sum().backward()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda z: topk_gate(z, 2).weights, (torch.randn(3, 8),), (torch.ones(3, 8),))


def test_threads_of_any_python_thread_follow_torch():
    from kimi_ops import _C

    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:

        def work():
            topk_gate(torch.randn(4, 8), 2)
            seen.append((_C.num_threads(), torch.get_num_threads()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen[0][0] == seen[0][1]
    finally:
        torch.set_num_threads(before)


def test_the_operators_themselves_check():
    gate, backward = torch.ops.kimi_ops.topk_gate, torch.ops.kimi_ops.topk_gate_backward
    rest = (1, 1, 2, True, 1.0, None, "scores")
    with pytest.raises(ValueError, match=r"expert_bias: expected shape \[16\], got \[3\]"):
        gate(LOGITS, 2, "sigmoid", torch.zeros(3), *rest)
    with pytest.raises(TypeError, match="logits: expected float32"):
        gate(LOGITS.double(), 2, "sigmoid", None, *rest)
    ids = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(TypeError, match="indices: expected int32, got int64"):
        backward(torch.zeros(4, 2), LOGITS, ids.long(), "sigmoid", True, 1.0)
    with pytest.raises(TypeError, match="grad_weights: expected float32, got float64"):
        backward(torch.zeros(4, 2).double(), LOGITS, ids, "sigmoid", True, 1.0)


def test_numpy_integers_count_as_integers():
    want = topk_gate(LOGITS, 2)
    assert torch.equal(topk_gate(LOGITS, numpy.int64(2)).indices, want.indices)


def test_rows_are_addressed_in_64_bits():
    """Rows 2^30 elements apart: the third begins past 2^31. Only its pages are ever touched."""
    storage = torch.empty(2**31 + 384, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 384), (2**30, 1))
    logits.copy_(torch.randn(3, 384))
    gate, dense = topk_gate(logits, 8), topk_gate(logits.contiguous(), 8)
    assert torch.equal(gate.indices, dense.indices) and torch.equal(gate.weights, dense.weights)


def test_expanded_row():
    gate = topk_gate(torch.randn(1, 384).expand(38_000, 384), 8)
    assert (gate.indices == gate.indices[0]).all() and gate.tokens_per_expert.max() == 38_000


LOGITS = torch.zeros(4, 16)


@pytest.mark.parametrize(
    "error,text,call",
    [
        (TypeError, "logits: expected a torch.Tensor, got list", lambda: topk_gate([1.0], 1)),
        (TypeError, "logits: expected float32, bfloat16, float16, got float64",
         lambda: topk_gate(LOGITS.double(), 2)),
        (ValueError, r"logits: expected shape \[..., E\], got \[\]",
         lambda: topk_gate(torch.tensor(1.0), 2)),
        (ValueError, "logits.shape.1.: expected 1..1024, got 1025",
         lambda: topk_gate(torch.zeros(1, 1025), 2)),
        (ValueError, "k: expected 1..16 .*got 17", lambda: topk_gate(LOGITS, 17)),
        (ValueError, "k: expected 1..16 .*got 0", lambda: topk_gate(LOGITS, 0)),
        (TypeError, "k: expected an int, got float", lambda: topk_gate(LOGITS, 2.0)),
        (TypeError, "scaling_factor: expected a number, got str",
         lambda: topk_gate(LOGITS, 2, scaling_factor="2")),
        (ValueError, "k: expected 1..32 .*got 33", lambda: topk_gate(torch.zeros(1, 64), 33)),
        (ValueError, "num_groups: expected a divisor of the 16 experts, got 3",
         lambda: topk_gate(LOGITS, 2, num_groups=3)),
        (ValueError, "topk_groups: expected 1..4, got 5",
         lambda: topk_gate(LOGITS, 2, num_groups=4, topk_groups=5)),
        (ValueError, "k: expected 1..4 .*1 group.s. of 4 experts.*got 5",
         lambda: topk_gate(LOGITS, 5, num_groups=4, topk_groups=1)),
        (ValueError, "group_score_topk: expected 1..4 .*got 5",
         lambda: topk_gate(LOGITS, 2, num_groups=4, topk_groups=2, group_score_topk=5)),
        (ValueError, "score_function: expected one of sigmoid, softmax, sqrtsoftplus, got 'relu'",
         lambda: topk_gate(LOGITS, 2, score_function="relu")),
        (ValueError, r"expert_bias: expected shape \[16\], got \[15\]",
         lambda: topk_gate(LOGITS, 2, expert_bias=torch.zeros(15))),
        (TypeError, "expert_bias: expected float32, got bfloat16; keep the bias in float32",
         lambda: topk_gate(LOGITS, 2, expert_bias=torch.zeros(16).bfloat16())),
        (ValueError, "expert_bias: expected on cpu as logits, got meta",
         lambda: topk_gate(LOGITS, 2, expert_bias=torch.zeros(16, device="meta"))),
        (ValueError, r"valid: expected shape \[4\], got \[3\]",
         lambda: topk_gate(LOGITS, 2, valid=torch.ones(3, dtype=torch.bool))),
        (TypeError, "valid: expected bool, got int32",
         lambda: topk_gate(LOGITS, 2, valid=torch.ones(4, dtype=torch.int32))),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match="topk_gate: " + text):
        call()


def test_fake_kernel_matches_real_strides_and_dtypes():
    with torch._subclasses.FakeTensorMode():
        gate = topk_gate(torch.empty(5, 16, device="cuda"), 2)
    assert gate.weights.device.type == "cuda" and gate.indices.dtype == torch.int32
    assert [t.shape for t in gate] == [(5, 2), (5, 2), (16,)]


def test_info_names_the_engine():
    assert kimi_ops.info()["engines"]["topk_gate"]["cpu"] in ("portable", "avx2", "avx512")
