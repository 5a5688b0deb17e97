# SPDX-License-Identifier: MIT
"""topk_gate with ids from elsewhere, with a mask, by logits, of any leading shape."""

import math

import pytest
import torch

from kimi_ops import fused_experts, permute_plan, topk_gate
from kimi_ops.reference import topk_gate as reference

SCORES = ("sigmoid", "softmax", "sqrtsoftplus")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_ids(tokens, experts, k, seed=1):
    """Different ids a token, some of them -1 and E."""
    order = random(tokens, experts, seed=seed).argsort(1)[:, :k].int()
    order[random(tokens, k, seed=seed + 1) > 1.2] = -1
    order[random(tokens, k, seed=seed + 2) > 1.2] = experts
    return order


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts,k", [(384, 8), (17, 5), (896, 16), (1, 1), (64, 32)])
def test_its_own_ids_give_its_own_bits(engine, score_function, dtype, experts, k):
    """Replay: the ids of a choice with a bias and groups, without them."""
    z = (random(20, experts) * 3).to(dtype).to(engine.device)
    first, again = z.clone().requires_grad_(), z.clone().requires_grad_()
    bias, valid = random(experts, seed=5).to(engine.device), torch.arange(20) % 7 != 3
    options = {"score_function": score_function, "scaling_factor": 2.827}
    gate = topk_gate(first, k, expert_bias=bias, valid=valid.to(engine.device), **options)
    for kind in (torch.int32, torch.int64):
        replay = topk_gate(again, ids=gate.indices.to(kind), **options)
        assert all(torch.equal(a, b) for a, b in zip(gate, replay, strict=True))
    grad = random(20, k, seed=6).to(engine.device)
    gate.weights.backward(grad)
    replay.weights.backward(grad)
    assert torch.equal(first.grad, again.grad)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_function", SCORES)
def test_values_and_gradient_in_fp64(engine, score_function, renormalize):
    z, ids = random(40, 60) * 2, some_ids(40, 60, 6)
    ids[3], ids[4] = -1, 60
    ids[5, 1:] = ids[5, 0] = 7  # one expert in every slot
    ids[6, 4] = ids[6, 1]
    valid = torch.arange(40) % 9 != 8
    options = {"score_function": score_function, "renormalize": renormalize, "scaling_factor": 2.5}
    x = z.clone().to(engine.device).requires_grad_()
    gate = topk_gate(x, ids=ids.to(engine.device), valid=valid.to(engine.device), **options)
    exact = z.double().requires_grad_()
    weights, indices, counts = reference.topk_gate(exact, ids=ids.long(), valid=valid, **options)
    torch.testing.assert_close(gate.weights.cpu().double(), weights, rtol=2e-6, atol=1e-12)
    assert torch.equal(gate.indices.cpu(), indices)
    assert torch.equal(gate.tokens_per_expert.cpu(), counts)
    assert counts.sum() == (indices >= 0).sum() and (indices[~valid] == -1).all()
    grad = random(40, 6, seed=9)
    gate.weights.backward(grad.to(engine.device))
    weights.backward(grad.double())
    assert (x.grad.cpu().double() - exact.grad).norm() < 2e-6 * exact.grad.norm()


def test_rows_apart_and_logits_that_are_no_numbers(engine):
    """A view of wider rows, as many routers make them: its own logits, NaN scored as 0."""
    wide = random(9, 40)
    wide[:, 3], wide[2, 17:] = math.nan, math.nan
    z, ids = wide[:, :17].to(engine.device), some_ids(9, 17, 4).to(engine.device)
    for score_function in SCORES:
        options = {"ids": ids, "score_function": score_function}
        gate, apart = topk_gate(z, **options), topk_gate(z.contiguous(), **options)
        assert all(torch.equal(a, b) for a, b in zip(gate, apart, strict=True))
        want = reference.topk_gate(z.cpu(), ids=ids.cpu().long(), score_function=score_function)
        torch.testing.assert_close(gate.weights.cpu(), want[0], rtol=2e-6, atol=1e-12)


def test_a_drifted_id_keeps_its_gradient(engine):
    """Not gathered from what was chosen: an expert that the scores would not choose counts too."""
    z = torch.tensor([[3.0, 2.0, -1.0, 0.0]], device=engine.device, requires_grad=True)
    gate = topk_gate(z, ids=torch.tensor([[2, 0]], device=engine.device), renormalize=False)
    want = torch.sigmoid(torch.tensor([-1.0, 3.0]))
    torch.testing.assert_close(gate.weights[0].cpu(), want, rtol=1e-6, atol=0)
    gate.weights.sum().backward()
    assert z.grad[0, 2] > 0 and not z.grad[0, [1, 3]].any()


def test_ids_out_of_range_are_refused(cpu_engine):
    z = torch.zeros(3, 8)
    for bad in (9, -2, 2**31, 2**32, -(2**33)):
        with pytest.raises(ValueError, match=r"ids: expected -1 .. 8, got .*mark slots"):
            topk_gate(z, ids=torch.tensor([[0, 1], [2, 3], [1, bad]]))


def test_nan_and_infinite_logits_of_given_ids(engine):
    z = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]], device=engine.device)
    z.requires_grad_()
    gate = topk_gate(z, ids=torch.tensor([[0, 1, 2, 3]], device=engine.device), renormalize=False)
    assert gate.weights.tolist() == [[0.0, 1.0, 0.0, 0.5]]
    gate.weights.sum().backward()
    assert z.grad.tolist() == [[0.0, 0.0, 0.0, 0.25]]


# ---- mask


@pytest.mark.parametrize("score_function", SCORES)
def test_masked_experts_are_not_there(engine, score_function):
    z, bias = random(50, 40) * 2, random(40, seed=3)
    mask = random(50, 40, seed=4) > 0.5
    mask[3], mask[4, 5:] = False, False
    x = z.clone().to(engine.device).requires_grad_()
    options = {"score_function": score_function, "scaling_factor": 2.5}
    gate = topk_gate(
        x, 6, mask=mask.to(engine.device), expert_bias=bias.to(engine.device), **options
    )
    exact = z.double().requires_grad_()
    want = reference.topk_gate(exact, 6, mask=mask, expert_bias=bias.double(), **options)
    found = gate.indices.cpu()
    assert torch.equal(found, want[1]) and torch.equal(gate.tokens_per_expert.cpu(), want[2])
    torch.testing.assert_close(gate.weights.cpu().double(), want[0], rtol=2e-6, atol=1e-12)
    assert (found >= 0).sum(1).tolist() == mask.sum(1).clamp(max=6).tolist()
    assert mask.gather(1, found.clamp(min=0).long())[found >= 0].all()
    grad = random(50, 6, seed=9)
    gate.weights.backward(grad.to(engine.device))
    want[0].backward(grad.double())
    assert (x.grad.cpu().double() - exact.grad).norm() < 2e-6 * exact.grad.norm()
    assert not x.grad.cpu()[~mask].any()


def test_one_mask_for_all_tokens_and_groups(engine):
    z = random(30, 32).to(engine.device)
    mask = torch.arange(32, device=engine.device) >= 8
    gate = topk_gate(z, 4, mask=mask, num_groups=4, topk_groups=2)
    assert (gate.indices >= 8).all()  # the first group's scores are -inf
    cut = topk_gate(z[:, 8:], 4, num_groups=3, topk_groups=2)
    assert torch.equal(gate.indices - 8, cut.indices) and torch.equal(gate.weights, cut.weights)
    everyone = topk_gate(z, 4, mask=torch.ones(30, 32, dtype=torch.bool, device=z.device))
    for a, b in zip(everyone, topk_gate(z, 4), strict=True):
        assert torch.equal(a, b)


# ---- by logits


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("experts,k", [(384, 8), (64, 20)])
def test_chosen_by_logits(engine, score_function, groups, experts, k):
    """Sigmoids that fp32 cannot tell apart: their logits decide, and groups add logits up."""
    z, bias = random(40, experts) * 40, random(experts, seed=3) * 5
    z[1, ::3], z[2], z[3, 1::2] = math.nan, 1.0, math.inf
    options = {"score_function": score_function, "num_groups": groups, "select": "logits"}
    options |= {"topk_groups": max(1, groups // 2), "expert_bias": bias}
    moved = {n: v.to(engine.device) if n == "expert_bias" else v for n, v in options.items()}
    gate = topk_gate(z.to(engine.device), k, **moved)
    want = reference.topk_gate(z, k, **options)
    assert torch.equal(gate.indices.cpu(), want[1])
    torch.testing.assert_close(gate.weights.cpu(), want[0], rtol=2e-5, atol=1e-12)


def test_routers_of_other_models():
    """A score function, a flag or one line in front of the gate; each against its own formula."""
    z, bias = random(64, 32) * 3, random(32, seed=1)
    # gpt-oss: the k best logits, softmax over them
    best = z.topk(4)
    gate = topk_gate(z, 4, score_function="softmax", select="logits")
    assert torch.equal(gate.indices.long(), best.indices)
    torch.testing.assert_close(gate.weights, best.values.softmax(1), rtol=2e-6, atol=1e-9)
    # kolibri1: by raw logits and a bias, weighed by sigmoids
    ids = (z + bias).topk(4).indices
    gate = topk_gate(z, 4, expert_bias=bias, select="logits", renormalize=False)
    assert torch.equal(gate.indices.long(), ids)
    torch.testing.assert_close(gate.weights, z.sigmoid().gather(1, ids), rtol=2e-6, atol=0)
    # laguna: capped logits
    x = z.clone().requires_grad_()
    capped = 5.0 * torch.tanh(x / 5.0)
    gate = topk_gate(capped, 4, score_function="softmax", renormalize=False)
    want = capped.softmax(1).topk(4)
    assert torch.equal(gate.indices.long(), want.indices)
    (ours,) = torch.autograd.grad(gate.weights.square().sum(), x, retain_graph=True)
    (theirs,) = torch.autograd.grad(want.values.square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- shapes, seams, torch


def test_leading_shapes(engine):
    z, valid = random(3, 5, 24).to(engine.device), (random(3, 5, seed=2) > -1).to(engine.device)
    flat = topk_gate(z.view(15, 24), 4, valid=valid.view(15))
    gate = topk_gate(z, 4, valid=valid)
    again = topk_gate(z, 4, ids=gate.indices, valid=valid)
    masked = topk_gate(z, 4, valid=valid, mask=torch.ones_like(z, dtype=torch.bool))
    for shaped in (gate, again, masked):
        assert shaped.weights.shape == shaped.indices.shape == (3, 5, 4)
        for a, b in zip(shaped, flat, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
    one = topk_gate(z[0, 0], 4)
    assert torch.equal(one.indices, topk_gate(z[0, :1], 4).indices[0])
    for none in (topk_gate(z[:, :0], 4), topk_gate(z[:, :0], ids=gate.indices[:, :0])):
        assert none.weights.shape == (3, 0, 4) and none.tokens_per_expert.tolist() == [0] * 24


def test_a_router_of_torch_feeds_the_plan(engine):
    """int64 ids, bf16 weights, weights first: as torch.topk and transformers give them."""
    weights, ids = random(6, 8).softmax(1).bfloat16().topk(3)
    assert ids.dtype == torch.int64
    ids[2, 1], ids[3, 2] = 8, -1
    ids = ids.to(engine.device)
    plan, same = permute_plan(ids, 8), permute_plan(ids.int(), 8)
    assert all(torch.equal(a, b) for a, b in zip(plan, same, strict=True))
    for far in (2**31, 2**32, -(2**32)):
        if engine.device == "cpu" and not engine.slow:
            with pytest.raises(ValueError, match="expected an expert in 0..7"):
                permute_plan(ids.masked_fill(ids == 8, far), 8)
    weights, indices = topk_gate(random(6, 8), 2)[:2]
    assert weights.dtype == torch.float32 and indices.shape == (6, 2)


def test_compile_full_graph():
    torch._dynamo.reset()

    def route(z, ids, mask):
        given = topk_gate(z, ids=ids)
        chosen = topk_gate(z, 3, mask=mask, select="logits")
        return (given.weights * chosen.indices[..., :2]).sum() + chosen.weights.sum(), given[2]

    compiled = torch.compile(route, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9):
        z, mask = random(2, tokens, 12), random(2, tokens, 12, seed=1) > -1
        ids = torch.randint(-1, 13, (2, tokens, 2))
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        (x, counts), (y, want) = compiled(a, ids, mask), route(b, ids, mask)
        x.backward()
        y.backward()
        assert torch.equal(x, y) and torch.equal(counts, want) and torch.equal(a.grad, b.grad)


def test_reference_gradcheck():
    z = random(5, 9).double().requires_grad_()
    ids, mask = some_ids(5, 9, 4), random(5, 9, seed=3) > -0.5
    for function in SCORES:
        assert torch.autograd.gradcheck(
            lambda z, f=function: reference.topk_gate(z, ids=ids, score_function=f)[0], (z,)
        )
        assert torch.autograd.gradcheck(
            lambda z, f=function: reference.topk_gate(z, 3, mask=mask, score_function=f)[0], (z,)
        )


Z, IDS = torch.zeros(4, 16), torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "error,text,call",
    [
        (TypeError, "k: expected an int, got None; pass it, or ids", lambda: topk_gate(Z)),
        (ValueError, "mask: expected none beside ids",
         lambda: topk_gate(Z, ids=IDS, mask=torch.ones(16).bool())),
        (TypeError, "mask: expected bool, got float32", lambda: topk_gate(Z, 2, mask=Z)),
        (ValueError, r"mask: expected shape \[4, 16\], got \[4, 15\]; or \[E\]",
         lambda: topk_gate(Z, 2, mask=Z[:, :15].bool())),
        (ValueError, r"mask: expected shape \[16\], got \[4\]",
         lambda: topk_gate(Z, 2, mask=torch.ones(4).bool())),
        (ValueError, r"ids: expected shape \[4, k\], got \[3, 2\]",
         lambda: topk_gate(Z, ids=IDS[:3])),
        (ValueError, r"ids: expected shape \[4, 3\], got \[4, 2\]",
         lambda: topk_gate(Z, 3, ids=IDS)),
        (TypeError, "ids: expected int32, got float32", lambda: topk_gate(Z, ids=IDS.float())),
        (ValueError, r"ids.shape\[1\]: expected 1..16, got 0",
         lambda: topk_gate(Z, ids=IDS[:, :0])),
        (ValueError, "select: expected one of scores, logits, got 'bias'",
         lambda: topk_gate(Z, 2, select="bias")),
        (ValueError, "score_function: expected one of sigmoid",
         lambda: topk_gate(Z, ids=IDS, score_function="relu")),
        (ValueError, r"valid: expected shape \[2, 2\], got \[4\]",
         lambda: topk_gate(Z.view(2, 2, 16), 2, valid=torch.ones(4).bool())),
    ],
)  # fmt: skip
def test_bad_input(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_of_given_ids_a_second_derivative_is_refused():
    z = random(3, 8).requires_grad_()
    loss = topk_gate(z, ids=torch.tensor([[0, 1]] * 3)).weights.square().sum()
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(
        RuntimeError, match="topk_gate_backward: expected to be differentiated once"
    ):
        grad.sum().backward()


def test_a_whole_layer_of_given_ids():
    x, gate_up, down = random(6, 8), random(4, 12, 8), random(4, 8, 6)
    gate = topk_gate(random(6, 4), ids=torch.tensor([[0, 3], [1, -1]] * 3))
    y = fused_experts(x, gate_up, down, gate.weights, gate.indices)
    assert y.shape == (6, 8) and y.isfinite().all()
