# SPDX-License-Identifier: MIT
"""Dense forms of the router, experts of limited capacity, and plans of maps."""

import math

import pytest
import torch

from kimi_ops import (
    dense_gate,
    drop_to_capacity,
    expert_capacity,
    normalized_scores,
    permute,
    permute_plan,
    permute_weights,
    topk_gate,
    unpermute,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dense_gate():
    z = random(3, 5, 12).bfloat16().requires_grad_()
    valid = torch.arange(15).view(3, 5) % 4 != 1
    gate, dense = topk_gate(z, 4, valid=valid), dense_gate(z, 4, valid=valid)
    assert dense.probs.dtype == z.dtype and dense.probs.shape == dense.routing_map.shape == z.shape
    assert torch.equal(dense.routing_map.sum(-1), 4 * valid.long())
    assert torch.equal(dense.routing_map.sum((0, 1)).int(), dense.tokens_per_expert)
    chosen = dense.probs.gather(-1, gate.indices.clamp(min=0).long())
    assert (
        torch.equal(chosen[valid], gate.weights[valid].bfloat16()) and not dense.probs[~valid].any()
    )
    (a,) = torch.autograd.grad(dense.probs.float().square().sum(), z)
    (b,) = torch.autograd.grad(gate.weights.bfloat16().float().square().sum(), z)
    assert torch.equal(a, b)
    twice = dense_gate(z, ids=torch.ones(3, 5, 2).long(), renormalize=False)
    torch.testing.assert_close(twice.probs[..., 1], 2 * z.sigmoid()[..., 1], rtol=0.01, atol=0)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_normalized_scores(score_function):
    z = random(4, 7).double().requires_grad_()
    s = {
        "sigmoid": z.sigmoid(),
        "softmax": z.softmax(1),
        "sqrtsoftplus": torch.nn.functional.softplus(z).sqrt(),
    }
    want = s[score_function] / s[score_function].sum(1, keepdim=True)
    torch.testing.assert_close(normalized_scores(z, score_function), want)
    assert torch.autograd.gradgradcheck(lambda z: normalized_scores(z, score_function), (z,))


@pytest.mark.parametrize("by", ["weights", "position"])
@pytest.mark.parametrize("capacity", [0, 1, 5, 100])
def test_drop_to_capacity(by, capacity):
    weights, ids = random(40, 3).abs(), random(40, 9, seed=1).argsort(1)[:, :3]
    weights[::4] = 0.5  # ties: the first stays
    ids[::7, 1], ids[::11, 0] = -1, 9
    w = weights.clone().requires_grad_()
    got = drop_to_capacity(w, ids, 9, capacity, by=by)
    for e in range(9):
        pairs = (ids.flatten() == e).nonzero().flatten().tolist()
        if by == "weights":
            pairs.sort(key=lambda pair: -weights.flatten()[pair].item())
        stay = (got.indices.flatten() == e).nonzero().flatten().tolist()
        assert sorted(pairs[:capacity]) == stay and got.tokens_per_expert[e] == len(stay)
    kept = got.indices >= 0
    assert torch.equal(got.weights, torch.where(kept, weights, 0.0))
    got.weights.sum().backward()
    assert torch.equal(w.grad, kept.float())


def test_a_weight_of_nan_counts_as_minus_infinity():
    weights = torch.tensor([[torch.nan], [-torch.inf], [-1.0], [torch.nan], [torch.inf]])
    ids = torch.zeros(5, 1, dtype=torch.int32)
    kept = [drop_to_capacity(weights, ids, 1, c).indices.flatten().tolist() for c in range(1, 5)]
    assert kept == [[-1, -1, -1, -1, 0], [-1, -1, 0, -1, 0], [0, -1, 0, -1, 0], [0, 0, 0, -1, 0]]


def test_megatron_s_rule_of_capacity():
    """Its words on dense matrices: the `capacity` largest probabilities of every column."""
    z, k, experts = random(64, 8), 2, 8
    capacity = expert_capacity(64, k, experts, 1.0)
    assert capacity == 16 and expert_capacity(65, 2, 8, 1.25) == math.ceil(65 * 2 / 8 * 1.25)
    dense, gate = dense_gate(z, k), topk_gate(z, k)
    kept = torch.zeros_like(dense.routing_map)
    kept.scatter_(0, dense.probs.topk(capacity, dim=0).indices, True)
    want = dense.routing_map & kept
    got = drop_to_capacity(gate.weights, gate.indices, experts, capacity)
    ours = torch.zeros(64, 9).bool()
    ours.scatter_(1, torch.where(got.indices < 0, 8, got.indices).long(), True)
    assert torch.equal(ours[:, :8], want) and not torch.equal(want, dense.routing_map)


@pytest.mark.parametrize("capacity", [0, 1, 4, 50])
def test_a_plan_padded_to_capacity(engine, capacity):
    ids, x = random(20, 6, seed=2).argsort(1)[:, :2].int(), random(20, 8)
    ids[3, 0], ids[4, 1] = -1, 6
    ids, x = ids.to(engine.device), x.to(engine.device)
    plan = permute_plan(ids, 6, capacity=capacity)
    assert plan.offsets.tolist() == [capacity * (e + 1) for e in range(6)]
    groups = permute(x, plan).view(6, capacity, 8)
    for e in range(6):
        tokens = (ids == e).any(1).nonzero().flatten()[:capacity]
        assert plan.tokens_per_expert[e] == len(tokens)
        assert (
            torch.equal(groups[e, : len(tokens)], x[tokens]) and not groups[e, len(tokens) :].any()
        )
    kept = plan.row_map >= 0
    assert torch.equal(unpermute(groups.flatten(0, 1), plan), x * kept.sum(1, keepdim=True))


# ---- plans of maps


def test_a_routing_map(engine):
    chosen, x, probs = random(30, 7) > 0.3, random(30, 5), random(30, 7, seed=1)
    chosen, x, probs = (t.to(engine.device) for t in (chosen, x, probs))
    plan = permute_plan(chosen, 7, align=4)
    assert plan.row_map.shape == (30, 7) and torch.equal(
        plan.tokens_per_expert, chosen.sum(0).int()
    )
    tokens = torch.cat([column.nonzero().flatten() for column in chosen.t()])
    where = plan.source[plan.source >= 0].long()
    assert torch.equal(where // 7, tokens)
    rows = permute(x, plan)
    torch.testing.assert_close(
        unpermute(rows, plan, probs), x * (probs * chosen).sum(1, keepdim=True)
    )
    exact = permute_plan(chosen, 7, num_out_tokens=int(chosen.sum()))
    assert torch.equal(permute(x, exact), x[tokens]) and exact.offsets[-1] == len(tokens)
    assert torch.equal(permute_weights(probs, exact), probs.t()[chosen.t()])


def test_exact_rows_fewer_and_more(engine):
    ids, x = (
        torch.tensor([[0, 1], [1, -1], [2, 0]]).to(engine.device),
        random(3, 4).to(engine.device),
    )
    full = permute_plan(ids, 3)
    assert torch.equal(permute(x, permute_plan(ids, 3, num_out_tokens=5)), permute(x, full)[:5])
    fewer, more = (permute_plan(ids, 3, num_out_tokens=n) for n in (3, 9))
    assert torch.equal(permute(x, fewer), permute(x, full)[:3])
    assert fewer.row_map.tolist() == [[0, 2], [-1, -1], [-1, 1]] and fewer.offsets.tolist() == [
        2,
        3,
        3,
    ]
    rows = permute(x, more)
    assert (
        rows.shape == (9, 4) and torch.equal(rows[:5], permute(x, full)[:5]) and not rows[5:].any()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_float32_of_16_bit_rows(engine, dtype):
    x, weights = random(9, 6).to(dtype).to(engine.device), random(9, 3).to(engine.device)
    plan = permute_plan(random(9, 5).argsort(1)[:, :3].to(engine.device), 5)
    rows = permute(x, plan).requires_grad_()
    w = weights.to(dtype).requires_grad_()
    y = unpermute(rows, plan, w, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.float() * w.float().sum(1, keepdim=True))
    assert torch.equal(unpermute(rows, plan, w), y.to(dtype))
    y.square().sum().backward()
    assert rows.grad.dtype == w.grad.dtype == dtype and rows.grad.any() and w.grad.any()


def test_a_plan_moves():
    plan = permute_plan(torch.tensor([[0, 1], [1, -1]]), 3)
    there = plan.to("meta")
    assert type(there) is type(plan) and all(t.device.type == "meta" for t in there)
    assert all(torch.equal(a, b) for a, b in zip(plan.to("cpu"), plan, strict=True))


def test_compile_full_graph():
    torch._dynamo.reset()

    def layer(z, x):
        gate = topk_gate(z, 2)
        kept = drop_to_capacity(gate.weights, gate.indices, 8, 5)
        plan = permute_plan(kept.indices, 8, capacity=5)
        dense = dense_gate(z, 2)
        mapped = permute_plan(dense.routing_map, 8, num_out_tokens=2 * len(z))
        first = unpermute(permute(x, plan), plan, kept.weights)
        return first + unpermute(permute(x, mapped), mapped, dense.probs)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (12, 31):
        z, x = random(tokens, 8), random(tokens, 6, seed=1)
        assert torch.equal(compiled(z, x), layer(z, x))


W, IDS = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "error,text,call",
    [
        (ValueError, "drop_to_capacity: by: expected one of weights, position",
         lambda: drop_to_capacity(W, IDS, 3, 1, by="probs")),
        (ValueError, "drop_to_capacity: capacity: expected 0..",
         lambda: drop_to_capacity(W, IDS, 3, -1)),
        (ValueError, r"drop_to_capacity: weights: expected shape \[4, 2\]",
         lambda: drop_to_capacity(W[:3], IDS, 3, 1)),
        (TypeError, "drop_to_capacity: indices: expected int32, int64",
         lambda: drop_to_capacity(W, W, 3, 1)),
        (ValueError, "expert_capacity: factor: expected a number above 0",
         lambda: expert_capacity(4, 2, 8, 0.0)),
        (ValueError, "expert_capacity: k: expected 1..", lambda: expert_capacity(4, 0, 8, 1.0)),
        (ValueError, "normalized_scores: score_function: expected one of",
         lambda: normalized_scores(W, "relu")),
        (ValueError, r"permute_plan: indices: expected shape \[T, 3\], got \[4, 2\]; a routing map",
         lambda: permute_plan(IDS.bool(), 3)),
        (ValueError, "permute_plan: capacity: expected align = 1",
         lambda: permute_plan(IDS, 3, align=2, capacity=4)),
        (ValueError, "permute_plan: capacity: expected align = 1 and no num_out_tokens",
         lambda: permute_plan(IDS, 3, num_out_tokens=2, capacity=4)),
        (ValueError, "permute_plan: num_out_tokens: expected 0..",
         lambda: permute_plan(IDS, 3, num_out_tokens=-1)),
        (TypeError, "unpermute: out_dtype: expected None, float32 or the dtype of y",
         lambda: unpermute(W, permute_plan(IDS[:1], 3), out_dtype=torch.float16)),
    ],
)  # fmt: skip
def test_bad_input(error, text, call):
    with pytest.raises(error, match=text):
        call()
