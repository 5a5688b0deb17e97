# SPDX-License-Identifier: MIT
"""A layout used again: with other tokens, with other weights, with none."""

from dataclasses import replace

import pytest
import torch

from kimi_ops import ExpertParallel, LocalWorld
from tests.dist.all_to_all_cases import random_case, triple


@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
@pytest.mark.parametrize("seed", [0, 2, 5, 9])
def test_other_tokens_and_weights_over_the_same_layout(seed, layout):
    generator = torch.Generator().manual_seed(seed)

    def like(parts):
        return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parts]

    case = random_case(seed, 3, layout=layout, capacity=None, overflow="raise")
    wide = torch.float64 if case.x[0].dtype == torch.float64 else torch.float32
    first = replace(case, weights=like([ids.to(wide) for ids in case.indices]))
    again = replace(first, x=like(first.x), weights=like(first.weights))
    cases = (first, again, replace(again, weights=None), first)
    wanted = []
    for each in cases:
        received = each.received()
        outs = [triple(rows.x) for rows in received]
        wanted.append((received, each.combined(outs, received)))

    def work(group):
        ep = ExpertParallel(group, **case.options)
        handle = None
        for each, (received, combined) in zip(cases, wanted, strict=True):
            weights = None if each.weights is None else each.weights[ep.rank]
            ids = each.indices[ep.rank] if handle is None else None
            rows = ep.dispatch(each.x[ep.rank], ids, weights, handle=handle)
            assert torch.equal(rows.x, received[ep.rank].x)
            assert torch.equal(ep.combine(triple(rows.x), rows.handle), combined[ep.rank])
            handle = rows.handle

    LocalWorld(3).run(work)


@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
def test_gradients_reach_the_weights_of_their_own_dispatch(layout):
    """Each token goes to the expert of the other rank, which multiplies by 2 or 3."""

    def work(group):
        options = {"hidden": 2, "max_tokens_per_rank": 4, "layout": layout}
        ep = ExpertParallel(group, num_experts=2, **options)
        ids = torch.tensor([[1 - ep.rank]], dtype=torch.int32)
        handle, found = None, []
        for value in (1.0, 5.0):
            x, w = torch.full((1, 2), value), torch.full((1, 1), value + 1)
            x.requires_grad_(), w.requires_grad_()
            rows = ep.dispatch(x, ids if handle is None else None, w, handle=handle)
            handle = rows.handle
            ep.combine(rows.x * (2 + ep.rank), handle).sum().backward()
            found.append((x.grad[0, 0].item(), w.grad.item()))
        return found

    first, second = LocalWorld(2).run(work)  # 3 w and 2 x 3, 2 w and 2 x 2
    assert first == [(6, 6), (18, 30)] and second == [(4, 4), (12, 20)]


@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
def test_weights_are_kept_until_their_own_combine(layout):
    """A dispatch that is combined, and differentiated, after others with other weights."""

    def work(group):
        options = {"hidden": 2, "max_tokens_per_rank": 4, "layout": layout}
        ep = ExpertParallel(group, num_experts=4, **options)
        ids = torch.tensor([[0, 3]], dtype=torch.int32)
        x = torch.full((1, 2), 1.0 + ep.rank, requires_grad=True)
        w = torch.tensor([[2.0, 3.0]], requires_grad=True)
        first = ep.dispatch(x, ids, w)

        def others():
            for turn in range(5):
                rows = ep.dispatch(x.detach() * 7, ids, torch.full((1, 2), 10.0 * turn))
                ep.combine(rows.x, rows.handle)

        others()
        y = ep.combine(first.x * (1 + ep.rank), first.handle)
        others()
        y.sum().backward()
        return y[0, 0].item(), x.grad[0, 0].item(), w.grad.tolist()

    # experts of rank 0 multiply by 1, those of rank 1 by 2: 2 x + 3 x 2
    assert LocalWorld(2).run(work) == [(8, 8, [[2, 4]]), (16, 8, [[4, 8]])]
