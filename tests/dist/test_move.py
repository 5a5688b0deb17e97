# SPDX-License-Identifier: MIT
"""Experts on their way between ranks: every byte arrives, nothing else changes, buffers are
small."""

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kimi_ops import (
    ExpertLoads,
    ExpertParallel,
    LocalWorld,
    MuonClip,
    eplb,
    move_experts,
    replica_ids,
)
from kimi_ops.parallel import EPMismatch, EPPeerError, EPRankLost
from kimi_ops.parallel.local import LocalTransport
from kimi_ops.parallel.move import Move, moves
from tests.dist.world import launch

KINDS = (
    ((), torch.float64), ((3, 5), torch.bfloat16), ((7,), torch.uint8), ((2, 1), torch.float32),
    ((0,), torch.float32), ((130,), torch.float8_e4m3fn),
)  # fmt: skip


def kept(expert, shape, dtype):
    """Bytes of an expert: every pattern there is, NaNs and all."""
    generator = torch.Generator().manual_seed(1000 * expert + len(shape))
    size = torch.empty(shape, dtype=dtype).nbytes
    found = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return found.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def held(placement, world, rank, kinds):
    """What a rank keeps for its slots."""
    mine = placement.view(world, -1)[rank].tolist()
    return [torch.stack([kept(e, *kind) for e in mine]) for kind in kinds]


def same(ours, expected):
    pairs = [(a, b) for a, b in zip(ours, expected, strict=True) if a.numel()]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def placement(choose, experts, slots):
    """Every expert at least once."""
    found = [*range(experts), *choose.choices(range(experts), k=slots - experts)]
    choose.shuffle(found)
    return torch.tensor(found)


@pytest.mark.parametrize("seed", range(40))
def test_every_byte_arrives(seed):
    choose = random.Random(seed)
    world = choose.choice((1, 2, 3, 4, 8))
    slots = world * choose.randint(1, 5)
    grown = slots if seed % 2 else world * choose.randint(1, 7)
    experts = choose.randint(1, min(slots, grown))
    old, new = placement(choose, experts, slots), placement(choose, experts, grown)
    kinds = choose.sample(KINDS, k=choose.randint(1, len(KINDS)))
    most = choose.choice((200, 2**10, 2**26))

    def work(group):
        tensors, wanted = (held(p, world, group.rank, kinds) for p in (old, new))
        before = [t.clone() for t in tensors]
        out = None if slots == grown and seed % 2 else [torch.empty_like(w) for w in wanted]
        came = move_experts(tensors, old, new, group, out=out, max_bytes=most)
        assert same(tensors if out is None else out, wanted)
        assert out is None or same(tensors, before)
        there = old.view(world, -1)[group.rank].tolist()
        missing = set(new.view(world, -1)[group.rank].tolist()) - set(there)
        assert came == len(missing) * sum(t[0].nbytes for t in before)

    LocalWorld(world).run(work)


def test_buffers_are_as_small_as_asked(monkeypatch):
    """Four experts of 1000 bytes change places in a circle; 100 bytes at once."""
    sizes = []
    start = LocalTransport.start

    def counted(self, buffer, sent, received):
        sizes.append((buffer.numel(), sum(received), max(sent, default=0)))
        return start(self, buffer, sent, received)

    monkeypatch.setattr(LocalTransport, "start", counted)
    old, new = torch.arange(4), torch.tensor([1, 2, 3, 0])

    def work(group):
        w = [torch.full((2, 500), 1.0 + 2 * group.rank, dtype=torch.bfloat16)]
        w[0][1] += 1
        assert move_experts(w, old, new, group, max_bytes=100) == 1000
        return w[0][:, 0].tolist(), w[0].unique().tolist()

    assert [found[0] for found in LocalWorld(2).run(work)] == [[2.0, 3.0], [4.0, 1.0]]
    # two leave, two arrive: 25 bytes of each at once
    assert len(sizes) == 2 * 40 and max(sizes) == (50, 50, 25)


def test_ways_are_the_shortest_and_shared():
    """Expert 7 is on ranks 0 and 1, and wanted by 1 (has it), 2 and 3: one sends each."""
    old, new = [7, 0, 7, 1, 2, 3, 4, 5], [7, 0, 1, 7, 7, 7, 7, 5]
    found = moves([*old, 9, 9], [*new, 9, 9], 5, in_place=True)
    assert Move(1, 1, 1, (0,)) in found and Move(1, 0, 1, (1,)) in found
    assert Move(0, 0, 2, (0, 1)) in found and Move(1, 0, 3, (0,)) in found
    assert len(found) == 4  # a slot that stays is left alone
    assert len(moves([*old, 9, 9], [*new, 9, 9], 5, in_place=False)) == 8


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"new": torch.tensor([3, 1, 2, 9])}, "new: expected experts of old, got 9 besides"),
        ({"new": torch.tensor([3, 1, 2])}, "new: expected experts, from 0 on, in a multiple of 2"),
        ({"new": torch.zeros(0, dtype=torch.int64)}, "in a multiple of 2 slots, got 0 of them"),
        ({"new": torch.tensor([3, 1, 2, -1])}, "new: expected experts, from 0 on"),
        ({"new": torch.tensor([3.0, 1, 2, 0])}, "new: expected int64, int32, got float32"),
        ({"new": torch.tensor([[3, 1, 2, 0]])}, r"new: expected shape \[S\]"),
        ({"old": [0, 1, 2, 3]}, "old: expected a torch.Tensor, got list"),
        ({"tensors": []}, "tensors: expected some tensors, got 0"),
        ({"tensors": [torch.zeros(3, 2)]}, r"tensors: expected shape \[2, 2\], got \[3, 2\]"),
        ({"tensors": [torch.zeros(2, 4)[:, :2]]}, "tensors: expected contiguous tensors"),
        ({"out": []}, "out: expected 1 tensors, got 0"),
        ({"out": [torch.zeros(2, 3)]}, r"out: expected shape \[2, 2\]"),
        ({"out": [torch.zeros(2, 2).half()]}, "out: expected float32, got float16"),
        ({"max_bytes": 0}, "max_bytes: expected 1.."),
    ],
)
def test_what_one_rank_refuses_is_told_to_all(changed, told):
    def work(group):
        w = torch.full((2, 2), 1.0 + group.rank)
        call = {"tensors": [w], "old": torch.arange(4), "new": torch.tensor([3, 1, 2, 0])}
        bad = group.rank == 1
        with pytest.raises((TypeError, ValueError) if bad else EPPeerError, match=told):
            move_experts(**{**call, **(changed if bad else {})}, group=group)
        assert w.unique().tolist() == [1.0 + group.rank]

    LocalWorld(2).run(work)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"new": torch.tensor([0, 1, 3, 2])}, "new: expected the same on every rank; rank 0 has 4"),
        ({"old": torch.tensor([0, 1, 3, 2])}, "old: expected the same on every rank"),
        ({"tensors": [torch.zeros(2, 3)]}, "tensors: expected the same .*; rank 0 has 1"),
        ({"out": [torch.zeros(2, 2)]}, "out: .*rank 0 has none, rank 1 has given"),
        ({"max_bytes": 64}, "max_bytes: expected the same"),
    ],
)  # fmt: skip
def test_ranks_that_differ_are_an_error_of_all(changed, told):
    def work(group):
        call = {"tensors": [torch.zeros(2, 2)], "old": torch.arange(4), "new": torch.arange(4)}
        call |= changed if group.rank == 1 else {}
        with pytest.raises(EPMismatch, match=told):
            move_experts(**call, group=group)

    LocalWorld(2).run(work)


def test_too_small_a_buffer_and_no_group():
    def work(group):
        with pytest.raises(ValueError, match="max_bytes: expected at least 2, a byte of each"):
            tensors, new = [torch.zeros(1, 9)], torch.tensor([1, 0])
            move_experts(tensors, torch.arange(2), new, group, max_bytes=1)

    LocalWorld(2).run(work)
    with pytest.raises(TypeError, match="group: expected a ProcessGroup .* got NoneType; call"):
        move_experts([torch.zeros(1, 9)], torch.arange(1), torch.arange(1))


def test_a_rank_that_is_gone_ends_the_others():
    def work(group):
        if group.rank == 1:
            raise KeyError("the cause")
        with pytest.raises(EPRankLost, match="rank 1 ended"):
            move_experts([torch.zeros(1, 2)], torch.arange(2), torch.tensor([1, 0]), group)

    with pytest.raises(KeyError, match="the cause"):
        LocalWorld(2).run(work)


def test_a_failure_half_way_says_what_is_left(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Connection reset by peer")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "all_to_all_single", fails)
        with pytest.raises(RuntimeError, match="reset by peer") as caught:
            move_experts([torch.zeros(2, 2)], torch.arange(2), torch.tensor([1, 0]))
        assert "experts are in part moved; go on from a checkpoint" in caught.value.__notes__[0]
    finally:
        dist.destroy_process_group()


def test_a_layer_with_replicas_is_the_layer():
    """Loads of some steps, replicas by eplb, weights moved, tokens sent to replicas: the bits of
    experts without."""
    experts, slots, world, hidden = 12, 16, 4, 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, hidden, generator=generator)
    hot = torch.randint(0, 3, (40, 1), generator=generator)
    ids = torch.cat([hot, torch.randint(3, experts + 1, (40, 2), generator=generator)], 1).int()
    weights = torch.rand(40, 3, generator=generator)
    w = torch.randn(experts, hidden, hidden, generator=generator)

    def layer(ep, matrices, x, ids, weights):
        rows = ep.dispatch(x, ids, weights)
        starts = [0, *rows.offsets.tolist()]
        spans = zip(starts, starts[1:], matrices, strict=False)
        out = torch.cat([rows.x[a:b] @ matrix for a, b, matrix in spans])
        return ep.combine(out, rows.handle), rows

    def work(group):
        mine = slice(group.rank * 10, group.rank * 10 + 10)
        size = {"hidden": hidden, "max_tokens_per_rank": 16, "layout": "expert_direct"}
        loads = ExpertLoads(1, experts, decay=0.5)
        with ExpertParallel(group, num_experts=experts, **size) as ep:
            held = w[ep.experts.start : ep.experts.stop].clone()
            y, rows = layer(ep, held, x[mine], ids[mine], weights[mine])
            before = rows.handle.loads
            loads.add(0, before)
            loads.step()
        placed = eplb(loads.totals, slots, 1, 1, world)
        new = placed.phy2log[0]
        out = torch.empty(slots // world, hidden, hidden)
        move_experts([held], torch.arange(experts), new, group, out=[out])
        with ExpertParallel(group, num_experts=slots, **size) as ep:
            replicas = replica_ids(ids[mine], placed, rank=group.rank)
            again, rows = layer(ep, out, x[mine], replicas, weights[mine])
            loads.add(0, rows.handle.loads, placed)
            loads.step()
        busiest = [n.sum(0).view(world, -1).sum(1).max() for n in (before, rows.handle.loads)]
        return y, again, loads.totals, placed, busiest

    found = LocalWorld(world).run(work)
    counts = torch.bincount(ids.flatten(), minlength=experts + 1)[:experts].double()
    for y, again, totals, placed, (before, after) in found:
        assert torch.equal(y, again)
        assert torch.equal(totals[0], 1.5 * counts)
        assert torch.equal(placed.phy2log, found[0][3].phy2log)
        assert after < 0.8 * before and int(placed.counts.max()) > 1


def trained(rank, group, placements):
    """Steps of MuonClip on this rank's experts, which move after each to the next placement."""
    world, experts = group.size(), 8
    old = placements[0]

    def own(p):
        return p.view(world, -1)[rank].tolist()

    def start(shape):
        all_ = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(len(shape)))
        return nn.Parameter(all_[own(old)])

    params = [start((6, 4)), start((4, 3))]
    optimizer = MuonClip(
        [{"params": [params[0]]}, {"params": [params[1]], "algorithm": "adamw"}], lr=0.05
    )
    for step, new in enumerate(placements):
        if step:
            for p in params:
                states = [s for s in optimizer.state[p].values() if s.shape == p.shape]
                assert len(states) >= 1
                move_experts([p, *states], old, new, group, max_bytes=512)
            old = new
        for p in params:
            generators = (torch.Generator().manual_seed(100 * step + e) for e in own(old))
            p.grad = torch.stack([torch.randn(p.shape[1:], generator=g) for g in generators])
        optimizer.step()
    return own(old), [p.detach() for p in params]


def train_and_move(rank: int, folder: str) -> None:
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 4)}
    choose = random.Random(5)
    placements = [placement(choose, 8, 8) for _ in range(4)]
    alone = trained(0, groups[1], [torch.arange(8)] * 4) if rank == 0 else None
    told = [alone]
    dist.broadcast_object_list(told, 0)
    for world in (2, 4):
        if rank < world:
            mine, params = trained(rank, groups[world], placements)
            for ours, whole in zip(params, told[0][1], strict=True):
                assert torch.equal(ours, whole[mine]), (world, rank)
            random_bytes(rank, groups[world])
    dist.barrier()
    if rank < 2:
        new = torch.tensor([1, 9 if rank else 0])
        with pytest.raises(ValueError if rank else EPPeerError, match="got 9 besides"):
            move_experts([torch.zeros(1)], torch.arange(2), new, groups[2])


def random_bytes(rank: int, group: dist.ProcessGroup) -> None:
    world, choose = group.size(), random.Random(7)
    for in_place in (True, False):
        slots = 4 * world
        old = placement(choose, 6, slots)
        new = placement(choose, 6, slots if in_place else 5 * world)
        tensors, wanted = (held(p, world, rank, KINDS) for p in (old, new))
        out = None if in_place else [torch.empty_like(w) for w in wanted]
        move_experts(tensors, old, new, group, out=out, max_bytes=900)
        assert same(tensors if out is None else out, wanted)


def test_experts_and_their_optimizer_move_between_processes(tmp_path):
    """Two and four of them, over gloo: the bits of one that moves nothing."""
    launch(train_and_move, tmp_path, 4)
