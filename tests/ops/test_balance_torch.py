# SPDX-License-Identifier: MIT
"""The losses as citizens of torch: oracle of torch itself, opcheck, compile, bad input."""

import pytest
import torch

import kimi_ops
from kimi_ops import sequence_balance_loss, topk_gate, update_expert_bias_, z_loss

LOGITS = torch.zeros(4, 16)
IDS = torch.zeros(4, 2, dtype=torch.int32)
BIAS = torch.zeros(16)
LOADS = torch.arange(16)


def torch_balance_loss(logits, indices, sequences, coefficient):
    """DeepSeek's auxiliary loss with one_hot and autograd, in float64."""
    experts, k = logits.shape[1], indices.shape[1]
    scores = logits.sigmoid()
    share = (scores / scores.sum(dim=1, keepdim=True)).view(sequences, -1, experts)
    hits = torch.nn.functional.one_hot(indices.long(), experts).sum(dim=1)
    hits = hits.view(sequences, -1, experts).double()
    frequency = hits.mean(dim=1) * experts / k
    return coefficient * (frequency * share.mean(dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("sequences", [1, 4])
def test_balance_loss_of_torch(sequences):
    torch.manual_seed(0)
    z = torch.randn(260, 96, requires_grad=True)
    indices = topk_gate(z.detach(), 6).indices
    loss = sequence_balance_loss(z, indices, num_sequences=sequences, coefficient=0.5)
    loss.backward()
    exact = z.detach().double().requires_grad_()
    want = torch_balance_loss(exact, indices, sequences, 0.5)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=5e-7)
    assert (z.grad - exact.grad).norm() < 1e-6 * exact.grad.norm()


def test_z_loss_of_torch():
    torch.manual_seed(0)
    z = (torch.randn(130, 96) * 4).requires_grad_()
    loss = z_loss(z, coefficient=0.5)
    loss.backward()
    exact = z.detach().double().requires_grad_()
    want = 0.5 * exact.logsumexp(dim=1).square().mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=5e-7)
    assert (z.grad - exact.grad).norm() < 1e-6 * exact.grad.norm()


def test_balancing_converges():
    """The rule evens out a router that prefers some experts; both rules, and the mean's drift."""
    torch.manual_seed(0)
    logits = torch.randn(2000, 16) + torch.linspace(-1, 1, 16)
    for centered in (False, True):
        bias = torch.zeros(16)
        for _ in range(300):
            gate = topk_gate(logits, 4, expert_bias=bias)
            update_expert_bias_(bias, gate.tokens_per_expert, 0.003, centered)
        assert gate.tokens_per_expert.max() < 1.1 * 2000 * 4 / 16
        assert not centered or abs(bias.mean().item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    ops, check = torch.ops.kimi_ops, torch.library.opcheck
    logits = torch.randn(12, 32).to(dtype).requires_grad_(requires_grad)
    indices = topk_gate(logits.detach(), 4).indices
    valid = torch.arange(12) > 2
    ends = torch.tensor([4, 4, 11], dtype=torch.int32)
    check(ops.sequence_counts.default, (indices, 32, 3, None, None))
    check(ops.sequence_counts.default, (indices, 32, 3, ends, valid))
    counts, tokens = ops.sequence_counts(indices, 32, 3, ends, valid)
    loss, of = ops.sequence_balance_loss.default, (ends, valid, 4, "sigmoid", 0.1)
    check(loss, (logits, counts, tokens, *of))
    check(loss, (logits.detach()[:, ::2], counts[:, :16], tokens, None, None, 4, "softmax", 0.1))
    check(ops.z_loss.default, (logits, 0.1, None))
    check(ops.z_loss.default, (logits, 0.1, valid))
    grad, z = torch.tensor(2.0), logits.detach()
    check(ops.sequence_balance_loss_backward.default, (grad, z, counts, tokens, *of))
    histogram, bounds = torch.zeros(32, 9, dtype=torch.int32), torch.tensor([-1.0, 1.0])
    histogram_op = ops.quantile_histogram_.default
    check(histogram_op, (histogram, z, torch.rand(12), bounds, "sigmoid", valid))
    check(
        histogram_op, (torch.zeros(32, 8).int()[:, ::2], z, torch.rand(12), bounds, "softmax", None)
    )
    _, log_sum_exp, valid_tokens = ops.z_loss_forward(z, 0.1, valid)
    check(ops.z_loss_backward.default, (grad, z, log_sum_exp, valid_tokens, 0.1))
    for loads in (torch.arange(32), torch.arange(64, dtype=torch.int32)[::2]):
        check(ops.update_expert_bias_.default, (torch.zeros(32), loads, 0.1, True))
    check(ops.update_expert_bias_.default, (torch.zeros(64)[::2], torch.arange(32), 0.1, False))


def test_compile_full_graph_with_dynamic_tokens():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests

    def step(logits, bias, sequences):
        gate = topk_gate(logits, 4, expert_bias=bias)
        loss = sequence_balance_loss(
            logits * 1.5, gate.indices, num_sequences=sequences, coefficient=1.0
        )
        loss = loss + z_loss(logits * 0.5, valid=gate.indices[:, 0] > 2)
        update_expert_bias_(bias, gate.tokens_per_expert, 0.01)
        return loss + bias.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for sequences, length in ((3, 5), (2, 17), (4, 33)):
        a = torch.randn(sequences * length, 24, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        bias, other = torch.zeros(24), torch.zeros(24)
        x, y = compiled(a, bias, sequences), step(b, other, sequences)
        x.backward()
        y.backward()
        assert torch.equal(x, y) and torch.equal(a.grad, b.grad)
        assert torch.equal(bias, other) and bias.any()
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0


def test_only_the_loss_is_differentiable():
    z = torch.randn(5, 8, requires_grad=True)
    loss, log_sum_exp, valid_tokens = torch.ops.kimi_ops.z_loss(z, 1.0, None)
    assert loss.requires_grad and not log_sum_exp.requires_grad and valid_tokens.item() == 5
    with torch.no_grad():
        assert not z_loss(z).requires_grad
    assert not sequence_balance_loss(z.detach(), IDS[:1].expand(5, 2)).requires_grad


def test_bias_that_autograd_saved_is_protected():
    """The in-place step counts as a version, so that a stale backward is refused."""
    bias = torch.ones(16)
    y = (torch.ones(16, requires_grad=True) * bias).sum()
    update_expert_bias_(bias, LOADS, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_rows_are_addressed_in_64_bits():
    """Rows 2^30 elements apart: the third begins past 2^31. Only its pages are ever touched."""
    storage = torch.empty(2**31 + 384, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 384), (2**30, 1))
    logits.copy_(torch.randn(3, 384))
    dense, indices = logits.contiguous(), topk_gate(logits, 8).indices
    far, near = logits.detach().requires_grad_(), dense.clone().requires_grad_()
    a = sequence_balance_loss(far, indices) + z_loss(far)
    b = sequence_balance_loss(near, indices) + z_loss(near)
    assert torch.equal(a, b)
    (grad,) = torch.autograd.grad(a, far)
    assert torch.equal(grad, torch.autograd.grad(b, near)[0])


def test_expanded_row():
    row = torch.randn(1, 384)
    many, one = z_loss(row.expand(38_000, 384)), z_loss(row)
    assert many.item() == pytest.approx(one.item(), rel=2e-5)  # 594 runs are added one by one


@pytest.mark.parametrize(
    "error,text,call",
    [
        (TypeError, "update_expert_bias_: bias: expected a torch.Tensor, got list",
         lambda: update_expert_bias_([0.0], LOADS, 0.1)),
        (TypeError, "update_expert_bias_: bias: expected float32, got bfloat16",
         lambda: update_expert_bias_(BIAS.bfloat16(), LOADS, 0.1)),
        (ValueError, r"update_expert_bias_: bias: expected shape \[E\], got \[1, 16\]",
         lambda: update_expert_bias_(BIAS[None], LOADS, 0.1)),
        (TypeError, "tokens_per_expert: expected int32, int64, got float32",
         lambda: update_expert_bias_(BIAS, LOADS.float(), 0.1)),
        (ValueError, r"tokens_per_expert: expected shape \[16\], got \[15\]",
         lambda: update_expert_bias_(BIAS, LOADS[:15], 0.1)),
        (ValueError, "tokens_per_expert: expected on cpu as bias, got meta",
         lambda: update_expert_bias_(BIAS, LOADS.to("meta"), 0.1)),
        (TypeError, "sequence_balance_loss: logits: expected .*float16, got float64",
         lambda: sequence_balance_loss(LOGITS.double(), IDS)),
        (ValueError, r"sequence_balance_loss: logits: expected shape \[T, E\]",
         lambda: sequence_balance_loss(LOGITS[None], IDS)),
        (ValueError, "sequence_balance_loss: logits.shape.1.: expected 1..1024, got 1025",
         lambda: sequence_balance_loss(torch.zeros(4, 1025), IDS)),
        (TypeError, "sequence_counts: indices: expected int32, got int16",
         lambda: sequence_balance_loss(LOGITS, IDS.short())),
        (ValueError, r"sequence_balance_loss: indices: expected shape \[4, K\], got \[3, 2\]",
         lambda: sequence_balance_loss(LOGITS, IDS[:3])),
        (ValueError, "sequence_balance_loss: indices.shape.1.: expected 1..",
         lambda: sequence_balance_loss(LOGITS, IDS[:, :0])),
        (ValueError, "num_sequences: expected a divisor of the 4 tokens, got 3",
         lambda: sequence_balance_loss(LOGITS, IDS, num_sequences=3)),
        (ValueError, "num_sequences: expected a divisor of the 4 tokens, got 0",
         lambda: sequence_balance_loss(LOGITS, IDS, num_sequences=0)),
        (ValueError, "score_function: expected one of sigmoid, softmax, sqrtsoftplus, got 'relu'",
         lambda: sequence_balance_loss(LOGITS, IDS, score_function="relu")),
        (TypeError, "z_loss: logits: expected .*, got int64",
         lambda: z_loss(torch.zeros(4, 16, dtype=torch.int64))),
        (ValueError, "z_loss: logits.shape.1.: expected 1..1024, got 0",
         lambda: z_loss(torch.zeros(4, 0))),
        (TypeError, "z_loss: valid: expected bool, got int32",
         lambda: z_loss(LOGITS, valid=torch.ones(4, dtype=torch.int32))),
        (ValueError, r"z_loss: valid: expected shape \[4\], got \[5\]",
         lambda: z_loss(LOGITS, valid=torch.ones(5, dtype=torch.bool))),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match=text):
        call()
    assert not BIAS.any()


def test_info_names_the_engine():
    assert kimi_ops.info()["engines"]["balance"]["cpu"] in ("portable", "avx2", "avx512")
