# SPDX-License-Identifier: MIT
"""Tokens that travel by nodes: the oracle's bits, one copy for each node, gradients, errors."""

import os
import threading
import time
from math import comb
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kimi_ops import ExpertParallel, LocalWorld
from kimi_ops.parallel import EPMismatch, EPPeerError, EPRankLost, EPTimeout
from kimi_ops.parallel.local import LocalTransport
from kimi_ops.reference import all_to_all as oracle
from tests.dist.all_to_all_cases import Case, check, check_without, random_case, triple
from tests.dist.world import fork, join

SHAPES = ((4, 2), (8, 4), (6, 2), (6, 3), (4, 1), (3, 3))  # ranks, ranks of a node
SMALL = {"num_experts": 4, "hidden": 2, "max_tokens_per_rank": 8}


def case_of(seed: int, shape: tuple[int, int]) -> Case:
    case = random_case(seed, shape[0], layout="rank_dedup", per_node=shape[1])
    if case.x[0].dtype == torch.float64 and case.wire == torch.float8_e4m3fn:
        case.wire = None  # results would travel in fp64
    return case


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_every_rank_has_the_bits_of_the_oracle(seed, shape):
    case = case_of(seed, shape)
    LocalWorld(case.world).run(lambda group: check(case, group, group.rank, triple))


def test_sums_of_a_node_are_rounded_once_by_hand():
    """Two nodes of two ranks, bf16: 257 is 256, 258 is even there."""
    x = [torch.ones(1, 1).bfloat16(), *[torch.ones(0, 1).bfloat16()] * 3]
    ids = [torch.arange(4)[None], *[torch.zeros(0, 4, dtype=torch.int64)] * 3]
    received = oracle.dispatch(x, ids, 4)
    outs = [torch.tensor([[v]]).bfloat16() for v in (256.0, 1.0, 1.0, 1.0)]

    def combined(**options):
        return oracle.combine(outs, received, ids, **options)[0].item()

    assert combined() == 260  # 259
    assert combined(ranks_per_node=1) == 260
    assert combined(ranks_per_node=2) == 258  # (256 + 1 = 257 -> 256) + (1 + 1)
    assert combined(ranks_per_node=4) == 260
    assert combined(ranks_per_node=2, wire_dtype=torch.float32) == 260


@pytest.mark.parametrize("seed", range(8))
def test_a_gradient_is_the_other_operation(seed):
    """Of the tokens: a combine by nodes without weights; of the results: the flat dispatch."""
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    case = case_of(seed, SHAPES[seed % 4])
    case.x, case.wire, case.weights = [x.to(dtype) for x in case.x], None, None
    case.capacity, case.overflow, case.align = None, "raise", 1
    received, generator = case.received(), torch.Generator().manual_seed(seed)
    grads = [torch.randn(r.x.shape, generator=generator).to(dtype) for r in received]
    dx = case.combined(grads, received)

    def work(group):
        with ExpertParallel(group, **case.options) as ep:
            x = case.x[ep.rank].clone().requires_grad_()
            rows = ep.dispatch(x, case.indices[ep.rank])
            rows.x.backward(grads[ep.rank])
            again = ep.dispatch(case.x[ep.rank], handle=rows.handle)
            out = torch.zeros_like(again.x, requires_grad=True)
            ep.combine(out, again.handle).backward(case.x[ep.rank])
            assert torch.equal(x.grad, dx[ep.rank])
            assert torch.equal(out.grad, received[ep.rank].x)

    LocalWorld(case.world).run(work)


@pytest.mark.parametrize("wire", [None, torch.float8_e4m3fn])
def test_gradients_are_those_without_nodes(wire):
    """Where sums are exact; and a node without a token takes part in the backward."""
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).float()

    counts = (3, 0, 5, 1)
    xs = [numbers(n, 2) for n in counts]
    ws, outer = [numbers(n, 3) / 4 for n in counts], [numbers(n, 2) for n in counts]
    ids = [torch.randint(-1, 3, (n, 3), generator=generator) for n in counts]  # none for node 1

    def layer(group, per_node):
        with ExpertParallel(group, wire_dtype=wire, ranks_per_node=per_node, **SMALL) as ep:
            x, w = xs[ep.rank].clone().requires_grad_(), ws[ep.rank].clone().requires_grad_()
            rows = ep.dispatch(x, ids[ep.rank] % 2, w)
            y = ep.combine(rows.x * (1.0 + ep.rank), rows.handle)
            return [y.detach(), *torch.autograd.grad(y, (x, w), outer[ep.rank])]

    def both(group):
        return layer(group, None), layer(group, 2)

    for flat, nodes in LocalWorld(4).run(both):
        assert all(torch.equal(a, b) for a, b in zip(flat, nodes, strict=True))


def test_operations_under_way_are_waited_for_in_any_order():
    def work(group):
        with ExpertParallel(group, num_buffers=2, ranks_per_node=2, **SMALL) as ep:
            ids = torch.tensor([[0, 3]])
            pending = [
                ep.dispatch(torch.full((1, 2), 10.0 * n + ep.rank), ids, async_op=True)
                for n in range(2)
            ]
            order = (0, 1) if ep.rank % 2 else (1, 0)
            rows = {n: pending[n].wait() for n in order}
            for n in range(2):
                want = [10.0 * n + rank for rank in range(4)] if ep.rank in (0, 3) else []
                assert rows[n].x[:, 0].tolist() == want
                y = ep.combine(rows[n].x, rows[n].handle)
                assert torch.equal(y, torch.full((1, 2), 2 * (10.0 * n + ep.rank)))
            x = torch.full((1, 2), 1.0 + ep.rank)
            for homeward in (True, False):  # one way and the other at once
                first = ep.dispatch(x, ids)
                begin = [
                    lambda: ep.dispatch(3 * x, ids, async_op=True),
                    lambda first=first: ep.combine(first.x, first.handle, async_op=True),
                ]
                both = []
                for start in begin[::-1] if homeward else begin:
                    both.append(start())
                    if ep.rank % 2:
                        both[-1].wait()
                second, y = sorted((each.wait() for each in both), key=torch.is_tensor)
                assert torch.equal(y, 2 * x)
                assert torch.equal(ep.combine(second.x, second.handle), 6 * x)

    LocalWorld(4).run(work)


@pytest.mark.parametrize("shape", [(4, 2), (8, 4), (8, 2)], ids=str)
def test_a_token_crosses_once_for_each_node(shape, monkeypatch):
    """K2's experts: of 8 nodes' ranks u(N) (N - 1) / N tokens cross, as docs and model say."""
    world, per_node = shape
    nodes, tokens, experts, top_k = world // per_node, 200, 384, 8
    told: dict[str, list[tuple[tuple[int, ...], list[int], int]]] = {}
    start = LocalTransport.start

    def counted(self, buffer, sent, received):
        name = threading.current_thread().name
        told.setdefault(name, []).append((tuple(self._members), list(sent), buffer.numel()))
        return start(self, buffer, sent, received)

    monkeypatch.setattr(LocalTransport, "start", counted)
    scores = torch.rand(world, tokens, experts, generator=torch.Generator().manual_seed(0))
    ids = scores.topk(top_k).indices

    def work(group):
        options = {"num_experts": experts, "hidden": 2, "max_tokens_per_rank": tokens}
        with ExpertParallel(group, ranks_per_node=per_node, **options) as ep:
            rows = ep.dispatch(torch.zeros(tokens, 2), ids[ep.rank])
            ep.combine(rows.x, rows.handle)
            return threading.current_thread().name

    names = LocalWorld(world).run(work)
    there, home, within = 0, 0, 0
    for rank, name in enumerate(names):
        (rail, out, _), (node, handed, _), _, (back, sums, _) = told[name]
        n, number = divmod(rank, per_node)
        assert rail == back == tuple(range(number, world, per_node))
        assert node == tuple(range(n * per_node, (n + 1) * per_node))
        row = 4 * 2 + 4 * top_k  # two columns, ids
        experts_of = ids[rank] // (experts // nodes)
        for other in range(nodes):
            assert out[other] == row * int((experts_of == other).any(1).sum())
        there += sum(out) - out[n]
        home += sum(sums) - sums[n]
        within += sum(handed) // row
    assert there // row == home // 8  # as many come back
    u = nodes * (1 - comb(experts - experts // nodes, top_k) / comb(experts, top_k))
    expected = u * (nodes - 1) / nodes
    assert abs(there / row / (world * tokens) - expected) < 0.03 * expected
    u = world * (1 - comb(experts - experts // world, top_k) / comb(experts, top_k))
    assert abs(within / (world * tokens) - u) < 0.03 * u  # no more copies than without nodes


def test_what_cannot_be_is_refused():
    def work(group):
        def refused(text, kind=ValueError, **options):
            with pytest.raises(kind, match=text):
                ExpertParallel(group, **SMALL | options)

        refused("ranks_per_node: expected a divisor of the 4 ranks, got 3", ranks_per_node=3)
        refused("ranks_per_node: expected 1..4", ranks_per_node=5)
        refused("ranks_per_node: expected an int", TypeError, ranks_per_node="2")
        told = "layout: expected rank_dedup with ranks_per_node, got expert_direct"
        refused(told, ranks_per_node=2, layout="expert_direct")
        refused("ranks_per_node: expected None with cuda", ranks_per_node=2, backend="cuda")
        refused("ranks_per_node", EPMismatch, ranks_per_node=1 + group.rank % 2)
        kind = ValueError if group.rank == 3 else EPPeerError
        with ExpertParallel(group, ranks_per_node=2, **SMALL) as ep:
            with pytest.raises(kind, match="got 9 .. 9"):
                ep.dispatch(torch.ones(1, 2), torch.tensor([[9 if ep.rank == 3 else 0]]))
            with pytest.raises(
                ValueError, match="equally many left on every node, got 2 on node 0, 1"
            ):
                ep.mask_rank(2 if ep.rank == 3 else 3)
            rows = ep.dispatch(torch.ones(1, 2), torch.tensor([[0]]))
            assert torch.equal(ep.combine(rows.x, rows.handle), torch.ones(1, 2))

    LocalWorld(4).run(work)


@pytest.mark.parametrize(("lost", "left"), [({2, 3}, 2), ({1, 2}, 1)], ids=str)
def test_nodes_and_ranks_are_masked(lost, left):
    case = case_of(5, (4, 2))
    case.capacity, case.overflow = None, "raise"
    # the ranks that are left make the nodes: sums of those that are lost are zeros

    def mask(ep: ExpertParallel) -> None:
        ep.mask_rank(*lost)
        assert ep._connection._hops.node.world == left

    check_without(case, lost, mask)


def _gloo(rank: int, folder: str) -> None:
    join(rank, folder, 4)
    group = dist.group.WORLD
    for seed in range(4):
        check(case_of(seed, (4, 2)), group, rank, triple)
    with ExpertParallel(ranks_per_node=2, timeout=2.0, **SMALL) as ep:
        rows = ep.dispatch(torch.ones(1, 2), torch.tensor([[0, 3]]))
        if rank < 3:
            with pytest.raises(EPTimeout) as late:
                ep.combine(rows.x, rows.handle)
            assert late.value.ranks == (3,), str(late.value)
        dist.barrier()
    ep = ExpertParallel(ranks_per_node=2, timeout=20.0, **SMALL)
    assert ep.backend == "gloo"
    rows = ep.dispatch(torch.ones(1, 2), torch.tensor([[0, 3]]))
    dist.barrier()
    if rank == 3:
        os._exit(0)  # rank 0 exchanges nothing with it
    with pytest.raises(EPRankLost) as caught:
        ep.combine(rows.x, rows.handle)
    assert caught.value.ranks == (3,), str(caught.value)
    if rank < 2:
        ep.mask_rank(2, 3)
        rows = ep.dispatch(torch.ones(1, 2), torch.tensor([[0, 3]]))
        assert torch.equal(ep.combine(rows.x, rows.handle), torch.ones(1, 2))
        ep.close()
        Path(folder, f"done {rank}").touch()
    while len(list(Path(folder).glob("done *"))) < 2:
        time.sleep(0.01)  # rank 2 must not have ended when others look who has
    os._exit(0)  # the default group has lost a rank: nobody can end it in order


def test_processes_of_two_nodes(tmp_path):
    fork(_gloo, 4, str(tmp_path))
