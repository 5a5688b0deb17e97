# SPDX-License-Identifier: MIT
"""Megatron's router and permutation by its names, against their meaning in plain torch."""

import pytest
import torch
from torch import Tensor

from kimi_ops.compat import megatron
from kimi_ops.compat import transformer_engine as te

H = 6
DTYPES = (torch.float32, torch.bfloat16)


def mask_of(tokens: int, experts: int, topk: int) -> Tensor:
    ids = torch.rand(tokens, experts).topk(topk, dim=1).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, ids, True)


def capacity_mask(tokens: int, experts: int, capacity: int) -> Tensor:
    """`capacity` tokens in every column: what padding to the capacity leaves."""
    return mask_of(experts, tokens, capacity).T.contiguous()


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=bound)


def same_gradients(mine: Tensor, want: Tensor, leaves, dtype: torch.dtype) -> None:
    given = torch.randn(mine.shape).to(mine.dtype)
    for got, exact in zip(
        torch.autograd.grad(mine, leaves, given, retain_graph=True),
        torch.autograd.grad(want, leaves, given.to(want.dtype), retain_graph=True),
        strict=True,
    ):
        close(got, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", ["dropless", "dropped", "missing", "capacity", "empty expert"])
def test_there_and_back(form, fused, dtype):
    torch.manual_seed(0)
    tokens, experts = 10, 4
    mask = capacity_mask(tokens, experts, 3) if form == "capacity" else mask_of(tokens, experts, 2)
    if form == "empty expert":
        mask[:, 1] = False
    routed = int(mask.sum())
    rows = {"dropped": 13, "missing": routed + 5}.get(form, routed)
    drop_and_pad = form == "capacity"
    x = torch.randn(tokens, H).to(dtype).requires_grad_()
    probs = (torch.rand(mask.shape) + 0.1).requires_grad_()
    counts = mask.sum(0)
    y, row_probs, index, pad_offsets, given = megatron.permute(
        x, mask, probs, rows + drop_and_pad * 2, fused, drop_and_pad, counts
    )
    expert, token = (ids[:rows] for ids in mask.T.nonzero(as_tuple=True))
    assert given is counts and pad_offsets is None and len(y) == len(row_probs) == rows
    assert torch.equal(y[: len(token)], x[token]) and not y[len(token) :].any()
    assert torch.equal(row_probs[: len(token)], probs[token, expert])
    same_gradients(y[: len(token)], x[token].float(), (x,), dtype)
    if not fused:
        assert index.dtype == torch.int64
        assert index.tolist() == [*token, *[-1] * (rows - len(token))]

    weight = torch.zeros(mask.shape).index_put((token, expert), torch.ones(len(token)))
    for weights in (None, probs):
        want = x * (weight if weights is None else weight * weights).sum(1, keepdim=True)
        leaves = (x,) if weights is None else (x, weights)
        for known in (mask, None) if weights is None and not drop_and_pad else (mask,):
            back = megatron.unpermute(
                y, index, x.shape, weights, known, fused, drop_and_pad and known is not None
            )
            assert back.dtype == dtype
            close(back, want, dtype)
            same_gradients(back, want.to(dtype), leaves, dtype)


def test_without_probs_nothing_is_zeroed():
    x, mask = torch.randn(3, H), torch.ones(3, 2, dtype=torch.bool)
    y, row_probs, *_ = megatron.permute(x, mask, num_out_tokens=6)
    assert row_probs is None and torch.equal(y, x.repeat(2, 1))
    zero = torch.zeros(3, 2)
    assert torch.equal(megatron.permute(x, mask, zero, 6)[0], y)
    assert not megatron.permute(x, mask, zero, 6, fused=True)[0].any()  # as TransformerEngine


def test_padding_is_transformer_engines():
    torch.manual_seed(0)
    mask, x = mask_of(9, 4, 2), torch.randn(9, H)
    probs = torch.rand(mask.shape)
    mine = megatron.permute(
        x, mask, probs, 18, fused=True, tokens_per_expert=mask.sum(0), align_size=8
    )
    theirs = te.moe_permute_and_pad_with_probs(x, probs, mask, mask.sum(0), 8)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    back = megatron.unpermute(mine[0], mine[2], x.shape, probs, fused=True, pad_offsets=mine[3])
    close(back, x * (probs * mask).sum(1, keepdim=True), torch.float32)


def test_no_tokens():
    x, mask = torch.empty(0, H), torch.empty(0, 4, dtype=torch.bool)
    for fused in (False, True):
        y, _, index, *_ = megatron.permute(x, mask, num_out_tokens=0, fused=fused)
        assert megatron.unpermute(y, index, x.shape, fused=fused).shape == (0, H)


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_tokens_of_other_ranks_alone(fused, with_probs):
    """A rank may see tokens of which none is for its experts."""
    x, mask = torch.randn(5, H, requires_grad=True), torch.zeros(5, 4, dtype=torch.bool)
    probs = torch.rand(5, 4, requires_grad=True) if with_probs else None
    y, row_probs, index, *_ = megatron.permute(x, mask, probs, num_out_tokens=0, fused=fused)
    assert y.shape == (0, H) and (row_probs is None or row_probs.shape == (0,))
    back = megatron.unpermute(y, index, x.shape, probs, mask, fused=fused)
    assert torch.equal(back, torch.zeros(5, H))
    back.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("fused", [False, True])
def test_chunks(fused):
    x, probs = torch.randn(6, H), torch.rand(6)
    sizes, order = torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1])
    take = torch.tensor([3, 4, 5, 0, 1, 2])
    rows, nothing = megatron.sort_chunks_by_idxs(x, sizes, order, fused=fused)
    assert nothing is None and torch.equal(rows, x[take])
    rows, row_probs = megatron.sort_chunks_by_idxs(x, sizes, order, probs, fused)
    assert torch.equal(rows, x[take]) and torch.equal(row_probs, probs[take])


ROUTES = [
    dict(), dict(use_pre_softmax=True), dict(score_function="sigmoid", scaling_factor=2.5),
    dict(num_groups=4, group_topk=2), dict(score_function="sqrtsoftplus"),
    dict(score_function="sigmoid", num_groups=4, group_topk=2, expert_bias=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("topk", [1, 4])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_every_form_of_the_router_says_the_same(route, topk, dtype):
    """Sparse is TransformerEngine's, dense is its chosen part; ids given back give it again."""
    if topk == 1 and "group_topk" in route:
        route = {**route, "group_topk": 1}
    torch.manual_seed(0)
    ladder = 1.1 ** torch.arange(16) / 4 - 2
    logits = torch.stack([ladder[torch.randperm(16)] for _ in range(9)]).to(dtype).requires_grad_()
    if "expert_bias" in route:
        route = {**route, "expert_bias": torch.randn(16) / 16}
    probs, mask = megatron.topk_routing_with_score_function(logits, topk, **route)
    names = ("use_pre_softmax", "num_groups", "group_topk", "scaling_factor")
    theirs = te.fused_topk_with_score_function(
        logits, topk, *(route.get(name) for name in names), route.get("score_function", "softmax"),
        route.get("expert_bias"),
    )  # fmt: skip
    assert torch.equal(probs, theirs[0]) and torch.equal(mask, theirs[1])
    dense, ids = megatron.topk_routing_with_score_function(
        logits, topk, **route, dense_output=True, fused=True
    )
    assert dense.dtype == dtype and ids.dtype == torch.int64
    assert torch.equal(probs.gather(1, ids), dense)
    order = torch.randperm(topk)
    again, given = megatron.topk_routing_with_score_function(
        logits, topk, **route, dense_output=True, precomputed_indices=ids[:, order]
    )
    assert torch.equal(given, ids[:, order])
    close(again, dense[:, order], dtype)
    same_gradients(again, dense[:, order].float(), (logits,), dtype)


X, MASK = torch.zeros(3, H), torch.ones(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: megatron.permute(X, MASK), "permute: num_out_tokens: expected the number of rows"),
        (lambda: megatron.permute(X, MASK, num_out_tokens=6, align_size=8), "align_size: expected"),
        (
            lambda: megatron.permute(
                X, MASK, num_out_tokens=6, return_batch_invariant_inverse_map=True
            ),
            "return_batch_invariant_inverse_map: expected False",
        ),
        (
            lambda: megatron.permute(X, MASK, num_out_tokens=4, drop_and_pad=True),
            "drop_and_pad: expected 2 tokens in every column",
        ),
        (
            lambda: megatron.unpermute(X, torch.arange(3), X.shape, probs=MASK * 1.0),
            "routing_map: expected one beside probs",
        ),
        (
            lambda: megatron.unpermute(X, torch.arange(3), X.shape, pad_offsets=torch.zeros(2)),
            "pad_offsets: expected None, got Tensor",
        ),
        (
            lambda: megatron.unpermute(
                X, torch.arange(3), X.shape, batch_invariant_inverse_map=torch.zeros(2)
            ),
            "batch_invariant_inverse_map: expected None",
        ),
        (
            lambda: megatron.topk_routing_with_score_function(X, 2, router_replay=object()),
            "router_replay: expected None",
        ),
        (
            lambda: megatron.topk_routing_with_score_function(X[None], 2),
            "logits: expected shape",
        ),
    ],
)
def test_what_is_not_served_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
