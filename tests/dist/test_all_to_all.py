# SPDX-License-Identifier: MIT
"""The oracle of dispatch and combine: what it says is true by other means than its own."""

import pytest
import torch

from kimi_ops.reference import all_to_all as oracle
from kimi_ops.reference import permute as one_rank
from tests.dist.all_to_all_cases import random_case


def dyadic(case):
    """The case with small whole numbers and weights of eighths: sums are exact in any order."""
    generator = torch.Generator().manual_seed(len(case.x[0]))

    def like(parts, scale, dtype):
        return [
            torch.randint(-8, 9, part.shape, generator=generator).to(dtype) / scale
            for part in parts
        ]

    case.x = like(case.x, 1, torch.float32)
    case.weights = like(case.indices, 8, torch.float32)
    case.wire = None
    return case


def pairs_of(case):
    """Every (source rank, token, slot) that is not dropped, with its expert."""
    return {
        (rank, token, slot): expert
        for rank, ids in enumerate(case.indices)
        for token, row in enumerate(ids.tolist())
        for slot, expert in enumerate(row)
        if 0 <= expert < case.experts
    }


def test_experts_are_shared_evenly():
    for experts in range(1, 30):
        for world in range(1, experts + 1):
            owned = oracle.experts_of(experts, world)
            assert [e for r in owned for e in r] == list(range(experts))
            sizes = [len(r) for r in owned]
            assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_a_thousand_random_calls_conserve_every_pair_in_order():
    for seed in range(1000):
        case = dyadic(random_case(seed))
        # every token tells its rank and number in its first columns
        case.x = [
            torch.cat([torch.full((len(x), 1), 1.0 + r), torch.arange(len(x))[:, None] + 1.0], 1)
            for r, x in enumerate(case.x)
        ]
        received, pairs = case.received(), pairs_of(case)
        kept = [pair for rows in received for pair in rows.pairs if pair is not None]
        assert len(kept) == len(set(kept)) and set(kept) <= pairs.keys()
        assert len(pairs) - len(kept) == sum(rows.dropped for rows in received)
        assert case.overflow == "drop" or len(kept) == len(pairs)
        owned = oracle.experts_of(case.experts, case.world)
        for rows, mine in zip(received, owned, strict=True):
            starts = [0, *rows.offsets.tolist()]
            for expert, begin, end, count in zip(
                mine, starts, starts[1:], rows.tokens_per_expert.tolist(), strict=False
            ):
                assert (end - begin) % case.align == 0 and 0 <= end - begin - count < case.align
                real, padding = rows.pairs[begin : begin + count], rows.pairs[begin + count : end]
                assert real == sorted(real) and all(pairs[pair] == expert for pair in real)
                assert set(padding) <= {None}
            assert len(rows.x) == len(rows.pairs) and set(rows.pairs[starts[-1] :]) <= {None}
            told = [[0, 0] if pair is None else [pair[0] + 1, pair[1] + 1] for pair in rows.pairs]
            assert rows.x.tolist() == told
            if case.capacity is not None:
                assert len(rows.x) % case.capacity == 0
                assert case.overflow == "grow" or len(rows.x) == case.capacity
        # expert e multiplies by (8 + e) / 8: the layer in closed form
        scales = [
            torch.tensor([0.0 if pair is None else 1 + pairs[pair] / 8 for pair in rows.pairs])
            for rows in received
        ]
        outs = [r.x * scale.view(-1, 1) for r, scale in zip(received, scales, strict=True)]
        kept = set(kept)
        for rank, y in enumerate(case.combined(outs, received)):
            factors = [
                sum(
                    case.weights[rank][token, slot].item() * (1 + pairs[rank, token, slot] / 8)
                    for slot in range(case.indices[rank].shape[1])
                    if (rank, token, slot) in kept
                )
                for token in range(len(y))
            ]
            expected = case.x[rank] * torch.tensor(factors, dtype=torch.float32).view(-1, 1)
            assert torch.equal(y, expected), seed


def test_combine_is_the_adjoint_of_dispatch():
    for seed in range(60):
        case = dyadic(random_case(seed))
        case.weights = None
        received = case.received()
        generator = torch.Generator().manual_seed(seed)
        ys = [torch.randint(-8, 9, rows.x.shape, generator=generator).float() for rows in received]
        there = sum((rows.x * y).sum() for rows, y in zip(received, ys, strict=True))
        # a padding row is no row of a token
        back = case.combined(ys, received)
        assert there == sum((x * y).sum() for x, y in zip(case.x, back, strict=True))


def test_the_tree_of_roundings_by_hand():
    """Three ranks of an expert each; bf16 rounds 257 to 256 and 259 to 260."""
    x = [torch.ones(1, 1, dtype=torch.bfloat16)] + [torch.ones(0, 1, dtype=torch.bfloat16)] * 2
    ids = [torch.tensor([[4, 0, 1, 2]])] + [torch.zeros(0, 4, dtype=torch.int64)] * 2
    received = oracle.dispatch(x, ids, 6)
    assert [rows.offsets.tolist() for rows in received] == [[1, 2], [1, 1], [1, 1]]
    outs = [torch.tensor(v, dtype=torch.bfloat16).view(-1, 1) for v in ([256, 1], [1], [2])]
    # rank 0: 256 + 1 = 257 -> 256; 256 + 1 + 2 = 259 -> 260
    assert oracle.combine(outs, received, ids)[0].item() == 260
    # the wire in fp32: 257 + 1 + 2 = 260
    outs[2] = torch.tensor([[1.0]], dtype=torch.bfloat16)
    assert oracle.combine(outs, received, ids, wire_dtype=torch.float32)[0].item() == 260
    assert oracle.combine(outs, received, ids)[0].item() == 258  # 256 + 1 + 1
    direct = oracle.combine(outs, received, ids, layout="expert_direct")[0]
    assert direct.item() == 260  # slots: 1 + 256 + 1 + 1 = 259, rounded once


def test_sums_and_what_travels_by_hand():
    """Ranks ascending, in fp32; results rounded to the wire once, in fp32 till then."""
    x = [torch.ones(1, 1)] + [torch.ones(0, 1)] * 2
    ids = [torch.tensor([[0, 2, 4, 1]])] + [torch.zeros(0, 4, dtype=torch.int64)] * 2
    received = oracle.dispatch(x, ids, 6)
    big = 2.0**24

    def combined(values, dtype=torch.float32, **options):
        outs = [torch.tensor(v, dtype=dtype).view(-1, 1) for v in values]
        return oracle.combine(outs, received, ids, **options)[0].item()

    assert combined([[big, 0], [1], [1]]) == big  # 2^24 + 1 is 2^24; from the end it is 2^24 + 2
    assert combined([[0, 0], [1], [big]]) == big  # 1 + 2^24 is 2^24
    assert combined([[1, 1], [big], [0]]) == big + 2  # of one rank first
    assert combined([[1, 1], [big], [0]], layout="expert_direct") == big  # 1 + 2^24 + 0 + 1
    # 257 is 256 in bf16: two of a rank are added before they travel, others travel alone
    bf16 = torch.bfloat16
    assert combined([[257, 1], [0], [0]], wire_dtype=bf16) == 258
    assert combined([[257, 0], [1], [0]], wire_dtype=bf16) == 257
    assert combined([[257, 1], [0], [0]], wire_dtype=bf16, layout="expert_direct") == 257
    # FP8 would make 16 of 17: results do not travel in it
    for layout in ("rank_dedup", "expert_direct"):
        values = [[17, 0], [0], [0]]
        found = combined(values, bf16, wire_dtype=torch.float8_e4m3fn, layout=layout)
        assert found == 17


def test_tokens_are_rounded_for_the_wire_by_hand():
    x = torch.zeros(1, 130)
    x[0, :2], x[0, 128:] = torch.tensor([448.0, 17.0]), torch.tensor([34.0, 17.0])
    ids = [torch.tensor([[0]])]

    def arrived(x, wire):
        return oracle.dispatch([x], ids, 1, wire_dtype=wire)[0].x

    # 448 leaves a scale of 1: 17 lies between 16 and 18; columns from 128 on have 34 / 448
    assert arrived(x, torch.float8_e4m3fn)[0, [0, 1, 128, 129]].tolist() == [448, 16, 34, 17]
    assert arrived(x.bfloat16(), torch.float8_e4m3fn).dtype == torch.bfloat16
    assert arrived(torch.full((1, 1), 257.0), torch.bfloat16).item() == 256
    assert arrived(torch.full((1, 1), 257.0), None).item() == 257
    exact = torch.full((1, 1), 257.0, dtype=torch.float64) + 2.0**-40
    assert torch.equal(arrived(exact, torch.float32).float(), torch.full((1, 1), 257.0))


def test_one_rank_is_permute_and_unpermute():
    for seed in range(40):
        case = random_case(seed, 1, capacity=None, overflow="raise", wire=None)
        received = case.received()
        plan = one_rank.permute_plan(case.indices[0], case.experts, case.align)
        rows = one_rank.permute(case.x[0], plan)
        assert torch.equal(received[0].x, rows[: len(received[0].x)])
        assert torch.equal(received[0].offsets, plan.offsets)
        padded = rows.new_zeros(rows.shape)
        padded[: len(received[0].x)] = received[0].x
        weights = None if case.weights is None else case.weights[0]
        expected = one_rank.unpermute(padded, plan, weights)
        assert torch.equal(case.combined([received[0].x], received)[0], expected)


def test_what_passes_the_capacity():
    x, ids = [torch.ones(6, 1)] * 2, [torch.tensor([[0]] * 5 + [[1]])] * 2
    # 10 rows of expert 0 and 2 of expert 1 for rank 0 of one expert each
    rows = oracle.dispatch(x, ids, 2, capacity=12)
    assert [r.dropped for r in rows] == [0, 0] and [len(r.x) for r in rows] == [12, 12]
    rows = oracle.dispatch(x, ids, 2, capacity=4, overflow="drop")
    assert [r.dropped for r in rows] == [6, 0]
    assert rows[0].pairs == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]  # the last ones go
    rows = oracle.dispatch(x, ids, 2, capacity=4, overflow="grow")
    assert [len(r.x) for r in rows] == [12, 12] and [r.dropped for r in rows] == [0, 0]
    rows = oracle.dispatch(x, ids, 2, capacity=5, overflow="grow")
    assert [len(r.x) for r in rows] == [10, 10]  # no more than is needed
    with pytest.raises(ValueError, match="10 rows for 9"):
        oracle.dispatch(x, ids, 2, capacity=9)
    # a small expert beside a large one keeps its rows
    rows = oracle.dispatch(x[:1], ids[:1], 2, capacity=4, overflow="drop")
    assert rows[0].tokens_per_expert.tolist() == [3, 1] and rows[0].dropped == 2


def test_the_oracle_is_differentiable():
    case = random_case(5, 3, capacity=None, overflow="raise", wire=None, align=1)
    case.x = [x.double()[:, :2].requires_grad_() for x in case.x]
    case.weights = [torch.rand(ids.shape).double().requires_grad_() for ids in case.indices]

    def layer(*tensors):
        case.x, case.weights = list(tensors[:3]), list(tensors[3:])
        received = case.received()
        return tuple(case.combined([rows.x.sin() for rows in received], received))

    assert torch.autograd.gradcheck(layer, (*case.x, *case.weights))
