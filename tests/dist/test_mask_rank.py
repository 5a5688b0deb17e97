# SPDX-License-Identifier: MIT
"""ExpertParallel goes on without ranks that are lost: the bits of a group whose lost ranks bring no
tokens and whose experts nobody chose."""

import time

import pytest
import torch

from kimi_ops import ExpertParallel, LocalWorld
from kimi_ops.parallel import EPRankLost, EPTimeout
from tests.dist.all_to_all_cases import check_without, random_case, survive
from tests.dist.world import fork, join


@pytest.mark.parametrize("lost", [{1}, {0}, {3}, {0, 2}], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_what_is_left_has_the_bits_of_the_oracle(seed, lost):
    def mask(ep: ExpertParallel) -> None:
        before = ep.rank, ep.experts
        if len(lost) > 1:  # found one after another
            with pytest.raises(EPRankLost):
                ep.mask_rank(min(lost))
        ep.mask_rank(*lost)
        assert ep.active_ranks == tuple(r for r in range(4) if r not in lost)
        assert (ep.rank, ep.experts) == before and ep.world == 4

    check_without(random_case(seed, 4), lost, mask)


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
    join(rank, folder, 3)
    survive(rank, backend)


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_processes_go_on_without_one_that_ended(tmp_path, backend):
    fork(_survive, 3, str(tmp_path), backend)
