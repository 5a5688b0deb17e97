# SPDX-License-Identifier: MIT
"""Replicas take turns: each the same share on every rank, and the tokens' own expert always."""

import pytest
import torch

from kimi_ops import eplb, replica_ids


def in_loops(indices, placement, layer, rank):
    """The rule, pair by pair."""
    seen: dict[int, int] = {}
    found = []
    for row in indices.tolist():
        found.append([])
        for expert in row:
            if not 0 <= expert < placement.counts.shape[1]:
                found[-1].append(-1)
                continue
            replicas = [r for r in placement.log2phy[layer, expert].tolist() if r >= 0]
            found[-1].append(replicas[(seen.get(expert, 0) + rank) % len(replicas)])
            seen[expert] = seen.get(expert, 0) + 1
    return found


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "slots", "experts"), [(0, 2, 4), (1, 1, 1), (50, 3, 7), (257, 8, 40)]
)
def test_the_rule_pair_by_pair(tokens, slots, experts, dtype):
    generator = torch.Generator().manual_seed(tokens)
    loads = torch.rand(2, experts, generator=generator) ** 6
    placement = eplb(loads, experts + 8 - experts % 8 + 8, 1, 1, 8)
    indices = torch.randint(-1, experts + 1, (tokens, slots), generator=generator, dtype=dtype)
    for layer, rank in ((0, 0), (1, 5)):
        found = replica_ids(indices, placement, layer, rank=rank)
        assert found.dtype == torch.int32 and found.shape == indices.shape
        assert found.tolist() == in_loops(indices, placement, layer, rank)


def test_every_replica_gets_its_share_and_ranks_begin_with_another():
    """Expert 0 has four replicas; 16 ranks send it one token each, or 10."""
    placement = eplb(torch.tensor([[8.0, 1, 1, 1]]), 8, 1, 1, 4)
    assert placement.counts[0, 0] == 5
    for tokens, mine in ((1, (0, 1)), (13, (2, 3))):
        ids = torch.zeros(tokens, 1, dtype=torch.int32)
        each = [
            torch.bincount(replica_ids(ids, placement, rank=rank).flatten(), minlength=8)
            for rank in range(15)
        ]
        places = placement.log2phy[0, 0]
        assert all({int(n) for n in counts[places]} <= set(mine) for counts in each)
        assert torch.equal(sum(each)[places], torch.full((5,), 15 * tokens // 5))


def test_ids_out_of_range_and_what_is_no_placement():
    placement = eplb(torch.ones(1, 4), 4, 1, 1, 2)
    with pytest.raises(ValueError, match="replica_ids: indices: expected ids in -1 .. 4, got 7"):
        replica_ids(torch.tensor([[7]]), placement)
    with pytest.raises(TypeError, match="placement: expected an ExpertPlacement, got Tensor"):
        replica_ids(torch.tensor([[0]]), placement.phy2log)  # type: ignore[arg-type]


def test_in_one_graph():
    placement = eplb(torch.rand(1, 6, generator=torch.Generator().manual_seed(0)), 8, 1, 1, 4)
    compiled = torch.compile(replica_ids, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (3, 17):
        ids = torch.arange(tokens * 2, dtype=torch.int32).view(tokens, 2) % 6
        assert torch.equal(compiled(ids, placement), replica_ids(ids, placement))
