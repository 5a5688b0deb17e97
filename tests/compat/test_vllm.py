# SPDX-License-Identifier: MIT
"""vLLM's routers, alignment and experts by its names, against their meaning in plain torch."""

import enum

import pytest
import torch
from torch import Tensor

from kimi_ops import Fp8BlockWeight
from kimi_ops.compat import vllm

DTYPES = (torch.float32, torch.bfloat16)


def logits_of(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Apart by more than bf16 rounds, so that nothing ties."""
    ladder = 1.1 ** torch.arange(experts) / 4 - 2
    return torch.stack([ladder[torch.randperm(experts)] for _ in range(tokens)]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk", [1, 6])
@pytest.mark.parametrize("ids_dtype", [None, torch.int64, torch.uint32], ids=str)
def test_fused_topk(topk, function, renormalize, dtype, ids_dtype):
    torch.manual_seed(0)
    logits = logits_of(11, 24, dtype)
    weights, ids, pairs = vllm.fused_topk(
        torch.empty(11, 3), logits, topk, renormalize, ids_dtype, function
    )
    scores = logits.float().softmax(1) if function == "softmax" else logits.float().sigmoid()
    want, want_ids = scores.topk(topk, dim=1)
    want = want / want.sum(1, keepdim=True) if renormalize else want
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-6)
    assert ids.dtype == (ids_dtype or torch.int32) and torch.equal(ids.long(), want_ids)
    assert pairs.dtype == torch.int32
    assert all(int(pairs[t, k]) == k * 11 + t for t in range(11) for k in range(topk))


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups,kept", [(1, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("renormalize,scaling", [(True, 1.0), (False, 2.5)])
def test_grouped_topk(groups, kept, renormalize, scaling, biased, function):
    torch.manual_seed(0)
    logits = logits_of(11, 32, torch.float32).requires_grad_()
    bias = torch.randn(32) / 16 if biased else None
    weights, ids = vllm.grouped_topk(
        torch.empty(11, 3), logits, 4, renormalize, groups, kept, function, scaling, bias
    )
    scores = logits.softmax(1) if function == "softmax" else logits.sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias
    by_group = choice.view(11, groups, -1)
    strength = by_group.sort(2, descending=True).values[..., : 2 if biased else 1].sum(2)
    inside = torch.zeros_like(strength, dtype=torch.bool)
    inside.scatter_(1, strength.topk(kept, dim=1).indices, True)
    choice = by_group.masked_fill(~inside[..., None], -torch.inf).flatten(1)
    want_ids = choice.topk(4, dim=1).indices
    want = scores.gather(1, want_ids)
    want = scaling * (want / want.sum(1, keepdim=True) if renormalize else want)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(ids.long(), want_ids)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-6)
    given = torch.randn(11, 4)
    torch.testing.assert_close(
        *(torch.autograd.grad(w, logits, given)[0] for w in (weights, want)), rtol=1e-4, atol=1e-5
    )


def aligned(flat: list[int], block: int, experts: int) -> tuple[list[int], list[int]]:
    """Pairs by expert, padded to blocks, and the experts of the blocks."""
    pairs, of = [], []
    for expert in range(experts):
        mine = [i for i, e in enumerate(flat) if e == expert]
        mine += [len(flat)] * (-len(mine) % block)
        pairs += mine
        of += [expert] * (len(mine) // block)
    return pairs, of


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("tokens,topk,experts", [(9, 2, 5), (1, 1, 8), (3, 2, 64), (0, 2, 4)])
def test_alignment(tokens, topk, experts, block, pad, dtype):
    torch.manual_seed(0)
    ids = torch.rand(tokens, experts).topk(topk, dim=1).indices.to(dtype)
    if tokens > 5:
        ids[3, 0], ids[4, 1] = -1, experts  # dropped
    got, expert, rows = vllm.moe_align_block_size(ids, block, experts, pad_sorted_ids=pad)
    pairs, of = aligned(ids.flatten().tolist(), block, experts)
    count, capacity = ids.numel(), ids.numel() + experts * (block - 1)
    capacity = -(-capacity // block) * block if pad else capacity
    capacity = min(capacity, count * block) if count < experts else capacity
    assert got.dtype == expert.dtype == rows.dtype == torch.int32
    assert len(got) == capacity and len(expert) == -(-capacity // block)
    assert rows.tolist() == [len(pairs)]
    assert got.tolist() == pairs + [count] * (capacity - len(pairs))
    assert expert.tolist() == of + [-1] * (len(expert) - len(of))


@pytest.mark.parametrize("ignore", [False, True])
def test_alignment_on_a_rank(ignore):
    """Blocks of other ranks are -1, or are not there."""
    torch.manual_seed(0)
    ids = torch.rand(7, 6).topk(2, dim=1).indices.int()
    local = torch.tensor([-1, 0, -1, 1, 2, -1], dtype=torch.int32)
    got, expert, rows = vllm.moe_align_block_size(ids, 4, 6, local, False, ignore)
    flat = ids.flatten().tolist()
    if ignore:
        flat = [int(local[e]) for e in flat]
    pairs, of = aligned(flat, 4, 6)
    of = of if ignore else [int(local[e]) for e in of]
    assert got[: len(pairs)].tolist() == pairs and rows.tolist() == [len(pairs)]
    assert expert[: len(of)].tolist() == of and (expert[len(of) :] == -1).all()


def layer(dtype: torch.dtype, experts: int = 6, tokens: int = 9, topk: int = 2):
    torch.manual_seed(0)
    x = torch.randn(tokens, 16).to(dtype)
    w1, w2 = torch.randn(experts, 24, 16) / 4, torch.randn(experts, 16, 12) / 3
    ids = torch.rand(tokens, experts).topk(topk, dim=1).indices
    return x, w1.to(dtype), w2.to(dtype), torch.rand(tokens, topk), ids


def restated(x, w1, w2, weights, ids, activation="silu", on_input=False) -> Tensor:
    """Token by token and expert by expert in fp64."""
    act = torch.nn.functional.silu if activation == "silu" else torch.nn.functional.gelu
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, k in ((t, k) for t in range(len(x)) for k in range(ids.shape[1])):
        e, weight = int(ids[t, k]), weights[t, k].double()
        if e < 0:
            continue
        token = x[t].double() * (weight if on_input else 1)
        gate, up = (w1[e].double() @ token).chunk(2)
        y[t] += w2[e].double() @ (act(gate) * up) * (1 if on_input else weight)
    return y


class Activation(enum.Enum):
    SILU = "silu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", Activation.SILU], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_experts(dtype, activation, ids_dtype):
    x, w1, w2, weights, ids = layer(dtype)
    ids = torch.where(torch.rand(ids.shape) < 0.2, -1, ids).to(ids_dtype)
    name = "silu" if activation is Activation.SILU else activation
    want = restated(x, w1, w2, weights, ids, name)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    y = vllm.fused_experts(x, w1, w2, weights, ids, activation=activation)
    assert y.dtype == dtype and (y - want).norm() / want.norm() < bound
    assert torch.equal(vllm.fused_experts(x, w1, w2, weights.double(), ids, activation=name), y)
    kept = x.clone()
    with torch.no_grad():
        assert vllm.fused_experts(kept, w1, w2, weights, ids, True, activation) is kept
    assert torch.equal(kept, y)


def test_experts_of_a_rank_add_up():
    x, w1, w2, weights, ids = layer(torch.float32)
    parts = []
    for mine in (torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4])):
        local = torch.full((6,), -1, dtype=torch.int32)
        local[mine] = torch.arange(3, dtype=torch.int32)
        for total in (-1, 6):
            part = vllm.fused_experts(
                x, w1[mine], w2[mine], weights, ids, global_num_experts=total, expert_map=local
            )
        parts.append(part)
    torch.testing.assert_close(sum(parts), vllm.fused_experts(x, w1, w2, weights, ids))


def test_weights_on_the_input():
    x, w1, w2, weights, ids = layer(torch.float32, topk=1)
    y = vllm.fused_experts(x, w1, w2, weights, ids, apply_router_weight_on_input=True)
    want = restated(x, w1, w2, weights, ids, on_input=True)
    assert (y - want).norm() / want.norm() < 1e-5
    assert (want - restated(x, w1, w2, weights, ids)).norm() / want.norm() > 0.1


def test_experts_train_and_may_be_quantised():
    x, w1, w2, weights, ids = layer(torch.float32)
    leaves = [t.requires_grad_() for t in (x, w1, w2, weights)]
    vllm.fused_experts(*leaves, ids).sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in leaves)
    with torch.no_grad():
        blocks = Fp8BlockWeight.quantize(w1), Fp8BlockWeight.quantize(w2)
        y, want = (vllm.fused_experts(x, *w, weights, ids) for w in (blocks, (w1, w2)))
    assert (y - want).norm() / want.norm() < 0.06


def test_fused_moe_is_router_and_experts():
    x, w1, w2, *_ = layer(torch.float32)
    logits = torch.randn(9, 6)

    def custom(hidden_states, gating_output, topk, renormalize):
        return gating_output[:, :topk].exp(), torch.zeros(9, topk).long()

    routers = {
        "plain": (dict(), vllm.fused_topk(x, logits, 2, True)[:2]),
        "grouped": (
            dict(use_grouped_topk=True, num_expert_group=3, topk_group=2),
            vllm.grouped_topk(x, logits, 2, True, 3, 2),
        ),
        "custom": (
            dict(custom_routing_function=custom),
            custom(x, logits, 2, True),
        ),
    }  # fmt: skip
    for arguments, routed in routers.values():
        y = vllm.fused_moe(x, w1, w2, logits, 2, True, **arguments)
        assert torch.equal(y, vllm.fused_experts(x, w1, w2, *routed))


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(quant_config=object()), "quant_config: expected None"),
        (dict(activation="swigluoai"), "activation: expected one of silu, gelu"),
        (dict(global_num_experts=12), "global_num_experts: expected 6, got 12"),
        (dict(expert_map=torch.zeros(5), global_num_experts=6), "expert_map: expected shape"),
        (dict(apply_router_weight_on_input=True), "topk_weights: expected shape"),
        (
            dict(inplace=True, topk_weights=torch.ones(9, 2).requires_grad_()),
            "inplace: expected",
        ),
    ],
)
def test_what_is_not_served_is_refused(changes, message):
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    good = dict(zip(names, layer(torch.float32), strict=True))
    with pytest.raises(ValueError, match=f"^fused_experts: {message}"):
        vllm.fused_experts(**{**good, **changes})


def test_the_routers_refuse():
    x, logits = torch.zeros(3, 4), torch.zeros(3, 8)
    with pytest.raises(ValueError, match="^fused_topk: gating_output: expected shape"):
        vllm.fused_topk(x[:2], logits, 2, True)
    with pytest.raises(ValueError, match="^fused_topk: scoring_func: expected one of"):
        vllm.fused_topk(x, logits, 2, True, scoring_func="tanh")
    with pytest.raises(ValueError, match="^grouped_topk: num_expert_group: expected 1"):
        vllm.grouped_topk(x, logits, 2, True)
    with pytest.raises(ValueError, match="^moe_align_block_size: block_size: expected 1"):
        vllm.moe_align_block_size(torch.zeros(2, 2).int(), 0, 4)
