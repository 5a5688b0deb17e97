# SPDX-License-Identifier: MIT
"""ExpertParallel over shared memory, with threads as ranks: the oracle's bits, and all else that
holds on other backends."""

import os
import random
import threading
import time

import pytest
import torch

from kimi_ops import ExpertParallel, LocalWorld
from kimi_ops.parallel import EPError, EPMismatch, EPMisuse, connection, segment
from kimi_ops.parallel.blocks import Blocks
from kimi_ops.parallel.segment import Opened, Segment
from tests.dist.test_again import *  # noqa: F403
from tests.dist.test_expert_parallel import (  # noqa: F401
    test_a_capacity_that_grew_stays,
    test_a_gradient_is_the_other_operation,
    test_a_layer_over_ranks_is_the_layer,
    test_dropped_pairs_have_no_gradient,
    test_every_rank_has_the_bits_of_the_oracle,
    test_expert_direct_does_not_depend_on_the_number_of_ranks,
    test_fp8_rows_travel_as_they_are,
    test_gradients_are_those_of_the_dense_layer,
    test_misuse_is_an_error_of_its_own,
    test_other_options_on_a_rank_are_an_error_of_all,
    test_overflow_is_raised_on_every_rank_before_a_row_moves,
    test_ranks_whose_experts_do_nothing_take_part_in_the_backward,
    test_two_operations_overlap_with_two_buffers,
    test_what_one_rank_refuses_is_told_to_all,
)


@pytest.fixture(autouse=True)
def threads_share_memory(monkeypatch):
    """The ranks of a LocalWorld map one segment each for themselves, as processes do."""
    lock = threading.Lock()

    def connect(group, backend, timeout, device, buffers, members, nodes):
        assert len(members) == group.size and not nodes, "a segment is of all ranks here"
        with lock:
            files = vars(group.world).setdefault("files", {})
            waiting = files.setdefault(next(group._numbers), [])
            if not waiting:
                waiting += [segment._create(group.size, buffers)]
                waiting += [os.dup(waiting[0]) for _ in range(1, group.size)]
            opened = Opened(waiting.pop(), [-1] * group.size)
        return Segment(opened, group.rank, group.size, buffers, min(timeout, 10.0)), "threads"

    monkeypatch.setattr(connection, "_connect", connect)


def test_ranks_that_wait_in_different_orders_do_not_mix_up_gradients():
    """Both dispatches have the same shapes: only their numbers tell them apart."""

    def work(group):
        with ExpertParallel(
            group, num_experts=2, hidden=2, max_tokens_per_rank=8, num_buffers=2, timeout=5.0
        ) as ep:
            ids = torch.tensor([[0], [1]], dtype=torch.int32)
            x = [torch.ones(2, 2, requires_grad=True) for _ in range(2)]
            pending = [ep.dispatch(each, ids, async_op=True) for each in x]
            order = pending if group.rank == 0 else pending[::-1]
            rows = [each.wait() for each in order]
            with pytest.raises(EPMismatch, match=r"the gradient of dispatch \d: .*different"):
                (rows[0].x.sum() + 2 * rows[1].x.sum()).backward()

    LocalWorld(2).run(work)


def test_an_operation_may_be_waited_for_when_its_window_is_needed_again():
    """With two under way there are three windows; the first dispatch outlives many others."""

    def work(group):
        ep = ExpertParallel(
            group, num_experts=2, hidden=2, max_tokens_per_rank=8, num_buffers=2, timeout=5.0
        )
        ids = torch.tensor([[0, 1]], dtype=torch.int32)
        x = torch.full((1, 2), 1.0 + ep.rank, requires_grad=True)
        first = ep.dispatch(x, ids, async_op=True)
        if ep.rank == 1:  # one rank waits, the other does not
            first.wait()
        for turn in range(5):
            rows = ep.dispatch(x.detach() * turn, ids)
            y = ep.combine(rows.x, rows.handle)
            assert torch.equal(y, 2 * turn * x)
        y = ep.combine(first.wait().x, first.wait().handle)
        y.sum().backward()
        return y.tolist(), x.grad.tolist()

    assert LocalWorld(2).run(work) == [([[2.0, 2.0]], [[2.0, 2.0]]), ([[4.0, 4.0]], [[2.0, 2.0]])]


def test_what_is_under_way_when_it_is_closed_is_out_of_use():
    def work(group):
        ep = ExpertParallel(group, num_experts=2, hidden=2, max_tokens_per_rank=8)
        pending = ep.dispatch(torch.ones(1, 2), torch.zeros(1, 1).int(), async_op=True)
        ep.close()
        with pytest.raises(EPMisuse, match="wait: the group is out of use: it was closed"):
            pending.wait()

    LocalWorld(2).run(work)


def test_a_rank_that_fails_while_it_writes_says_so(monkeypatch):
    def work(group):
        ep = ExpertParallel(group, num_experts=3, hidden=2, max_tokens_per_rank=8)
        x, ids = torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int32)
        if ep.rank == 1:
            begin = ep._connection.transport.begin

            def full(*what):
                message = begin(*what)
                message.own = None
                return message

            ep._connection.transport.begin = full
        with pytest.raises(
            TypeError if ep.rank == 1 else EPError, match="None.*subscript"
        ) as caught:
            ep.dispatch(x, ids)
        return str(caught.value)

    told = LocalWorld(3).run(work)
    assert told[0].startswith("dispatch: no rank can go on: rank 1: TypeError: ")


def test_memory_of_rows_is_used_again_when_the_last_tensor_on_it_is_gone():
    blocks = Blocks()
    rows = blocks.empty(4096, 1024, torch.float32)
    rows.fill_(1.0)
    address, view = rows.data_ptr(), rows[7].view(-1)
    del rows
    other = blocks.empty(4096, 1000, torch.float32)  # a view is still there
    assert other.data_ptr() != address and torch.equal(view, torch.ones(1024))
    del view
    again = blocks.empty(4096, 1000, torch.float32)
    assert again.data_ptr() == address and again.shape == (4096, 1000)
    small = blocks.empty(4, 1000, torch.bfloat16)
    assert small.shape == (4, 1000) and small.dtype == torch.bfloat16
    many = [blocks.empty(4096, 1024, torch.float32) for _ in range(9)]
    del many, other, again
    assert len(blocks._free) == 4


def test_more_ranks_than_flags():
    class Roll:
        world = 65

        def elsewhere(self):
            return []

    assert segment.share(Roll(), 1, 1.0) == (None, "65 ranks, of at most 64")


def test_rows_are_never_read_before_they_are_written():
    """Many small messages of random sizes, each rank at its own pace: values tell their writer."""

    def work(group):
        ep = ExpertParallel(group, num_experts=3, hidden=64, max_tokens_per_rank=16)
        pace, sizes = random.Random(ep.rank), random.Random(7)
        ids = torch.arange(3, dtype=torch.int32).expand(16, 3)
        for turn in range(300):
            count = sizes.randrange(17)
            if pace.random() < 0.1:
                time.sleep(pace.random() * 2e-3)
            x = torch.full((count, 64), float(3 * turn + ep.rank))
            rows = ep.dispatch(x, ids[:count])
            found = rows.x.view(3, count, 64)
            told = (3.0 * turn + torch.arange(3.0)).view(3, 1, 1)
            assert torch.equal(found, told.expand_as(found)), turn
            y = ep.combine(rows.x, rows.handle)
            assert torch.equal(y, 3 * x), turn

    LocalWorld(3).run(work)
