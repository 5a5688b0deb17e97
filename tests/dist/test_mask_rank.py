# SPDX-License-Identifier: MIT
"""ExpertParallel goes on without ranks that are lost: the bits of a group whose lost ranks bring no
tokens and whose experts nobody chose."""

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from kimi_ops import ExpertParallel, LocalWorld
from kimi_ops.parallel import EPMisuse, EPRankLost, EPTimeout
from tests.dist.all_to_all_cases import Case, random_case, triple
from tests.dist.world import fork


def without(case: Case, lost: set[int]) -> Case:
    """The case as it is where those ranks bring nothing and their experts get nothing."""
    small, more = divmod(case.experts, case.world)
    owners = [rank for rank in range(case.world) for _ in range(small + (rank < more))]
    gone = torch.tensor([*(owner in lost for owner in owners), False])

    def kept(ids):
        return ids.masked_fill(gone[ids.long().remainder(case.experts + 1)], -1)

    x = [t[:0] if rank in lost else t for rank, t in enumerate(case.x)]
    ids = [t[:0] if rank in lost else kept(t) for rank, t in enumerate(case.indices)]
    weights = case.weights and [t[: len(i)] for t, i in zip(case.weights, ids, strict=True)]
    return replace(case, x=x, indices=ids, weights=weights)


@pytest.mark.parametrize("lost", [{1}, {0}, {3}, {0, 2}], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_what_is_left_has_the_bits_of_the_oracle(seed, lost):
    case = random_case(seed, 4)
    rest = without(case, lost)
    received = rest.received()
    outs = [triple(rows.x) for rows in received]
    combined = rest.combined(outs, received)

    def work(group):
        with ExpertParallel(group, **case.options) as ep:
            if group.rank in lost:
                return
            with pytest.raises(EPRankLost) as caught:
                ep.dispatch(case.x[group.rank], case.indices[group.rank])
            assert set(caught.value.ranks) <= lost
            before = ep.experts
            if len(lost) > 1:  # found one after another
                with pytest.raises(EPRankLost):
                    ep.mask_rank(min(lost))
            ep.mask_rank(*lost)
            assert ep.active_ranks == tuple(r for r in range(4) if r not in lost)
            assert (ep.rank, ep.world, ep.experts) == (group.rank, 4, before)
            weights = case.weights and case.weights[group.rank]
            rows = ep.dispatch(case.x[group.rank], case.indices[group.rank], weights)
            assert torch.equal(rows.x, received[group.rank].x)
            assert torch.equal(rows.offsets, received[group.rank].offsets)
            assert rows.handle.dropped == received[group.rank].dropped
            y = ep.combine(triple(rows.x), rows.handle)
            assert torch.equal(y, combined[group.rank])

    LocalWorld(4).run(work)


def test_gradients_of_dropped_pairs_are_zero():
    def work(group):
        ep = ExpertParallel(group, num_experts=3, hidden=2, max_tokens_per_rank=4)
        if group.rank == 1:
            return
        with pytest.raises(EPRankLost):
            ep.dispatch(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int32))
        ep.mask_rank(1)
        x = torch.ones(1, 2, requires_grad=True)
        weights = torch.ones(1, 3, requires_grad=True)
        rows = ep.dispatch(x, torch.tensor([[0, 1, 2]]), weights)
        ep.combine(rows.x * (1.0 + ep.rank), rows.handle).sum().backward()
        assert x.grad.tolist() == [[4.0, 4.0]] and weights.grad.tolist() == [[2.0, 0.0, 6.0]]

    LocalWorld(3).run(work)


def test_errors_name_ranks_by_their_own_numbers():
    def work(group):
        ep = ExpertParallel(group, num_experts=4, hidden=2, max_tokens_per_rank=4, timeout=1.0)
        if group.rank == 0:
            return
        with pytest.raises(EPRankLost):
            ep.dispatch(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int32))
        ep.mask_rank(0)
        if group.rank == 2:
            time.sleep(2.0)
            return
        with pytest.raises(EPTimeout, match="rank 2 did not come") as caught:
            ep.dispatch(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int32))
        assert caught.value.ranks == (2,)

    LocalWorld(4).run(work)


def test_what_cannot_be_masked_is_refused_and_changes_nothing():
    def work(group):
        with ExpertParallel(group, num_experts=2, hidden=2, max_tokens_per_rank=4) as ep:
            for ranks, error, text in [
                ((), ValueError, "expected at least one, got none"),
                ((group.rank,), ValueError, f"this is rank {group.rank}"),
                ((2,), ValueError, "got 2; this is"),
                (("1",), TypeError, "ranks: expected an int"),
            ]:
                with pytest.raises(error, match=f"mask_rank: .*{text}"):
                    ep.mask_rank(*ranks)
            rows = ep.dispatch(torch.ones(1, 2), torch.tensor([[0, 1]]))
            assert len(rows.x) == 2 and ep.active_ranks == (0, 1)
            ep.combine(rows.x, rows.handle)

    LocalWorld(2).run(work)


def _survive(rank: int, folder: str, backend: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    sizes = {"num_experts": 6, "hidden": 2, "max_tokens_per_rank": 8, "timeout": 20.0}
    ep = ExpertParallel(backend=backend, **sizes)
    ids, x = torch.arange(6).view(1, 6), torch.full((1, 2), 1.0 + rank)
    rows = ep.dispatch(x, ids)
    ep.combine(rows.x, rows.handle)
    if rank == 1:
        os._exit(0)  # killed between two layers
    with pytest.raises(EPRankLost) as caught:
        ep.dispatch(x, ids)
    assert caught.value.ranks == (1,), str(caught.value)
    ep.mask_rank(*caught.value.ranks)
    with pytest.raises(EPMisuse, match="expected one of this ExpertParallel"):
        ep.combine(rows.x, rows.handle)
    for _ in range(3):
        rows = ep.dispatch(x, ids)
        assert rows.x[:, 0].tolist() == [1.0, 3.0] * 2 and ep.backend == backend
        assert ep.combine(rows.x, rows.handle)[0].tolist() == [4.0 * (1 + rank)] * 2
    ep.close()
    os._exit(0)  # the default group has lost a rank: nobody can end it in order


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_processes_go_on_without_one_that_ended(tmp_path, backend):
    fork(_survive, 3, str(tmp_path), backend)
