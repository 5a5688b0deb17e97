# SPDX-License-Identifier: MIT
"""ExpertParallel over gloo: the oracle's bits, and ranks that stop, raise or are killed.

Four processes over loopback; what ends one of them comes last. The parent ends what is left."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kimi_ops import ExpertParallel
from kimi_ops.parallel import (
    EPMismatch,
    EPMisuse,
    EPOverflow,
    EPPeerError,
    EPRankLost,
    EPTimeout,
)
from tests.dist.all_to_all_cases import check, random_case, triple

PROCESSES = 4
DEADLINE = 3.0
SIZES: dict[str, int] = {"num_experts": 4, "hidden": 2, "max_tokens_per_rank": 8}
SMALL: dict[str, Any] = {**SIZES, "backend": "gloo"}
ID = torch.zeros(1, 1, dtype=torch.int32)


Groups = dict[int, dist.ProcessGroup]  # of the first so many ranks


def same_bits(groups: Groups, rank: int) -> None:
    for world in (1, 2, 4):
        if rank < world:
            for seed in range(8):
                check(random_case(1000 * world + seed, world), groups[world], rank, triple, "gloo")


def gradients(group: dist.ProcessGroup, rank: int) -> None:
    """Of a layer of squares, in closed form; rank 2 has no token."""
    with ExpertParallel(group, **SMALL) as ep:
        assert ep.backend == "gloo" and ep.backend_reason == "it was asked for"
        count = 0 if rank == 2 else 2
        x = torch.full((count, 2), 1.0 + rank, requires_grad=True)
        w = torch.full((count, 2), 0.5, requires_grad=True)
        ids = torch.tensor([[rank, 3]] * count, dtype=torch.int32).view(-1, 2)
        rows = ep.dispatch(x, ids, w, async_op=True).wait()
        y = ep.combine(rows.x.square() * (rank + 1), rows.handle)
        y.sum().backward()
        value = 1.0 + rank
        factor = 0.5 * (value + 4)  # expert e multiplies by e + 1
        assert torch.equal(y, torch.full((count, 2), factor * value**2))
        assert torch.equal(x.grad, torch.full((count, 2), 2 * factor * value))
        expected = torch.tensor([[value, 4.0]] * count).view(-1, 2) * 2 * value**2
        assert torch.equal(w.grad, expected)


def errors_of_all(group: dist.ProcessGroup, rank: int) -> None:
    bad = rank == 1
    with pytest.raises(EPMismatch, match="hidden: .*rank 0 has 2, rank 1 has 3"):
        ExpertParallel(group, **{**SMALL, **({"hidden": 3} if bad else {})})
    told = "expected one of auto, shm, gloo, nccl, cuda, reference, got 'mpi'"
    with pytest.raises(ValueError, match=told):
        ExpertParallel(group, backend="mpi", **SIZES)
    with pytest.raises(
        ValueError, match="expected shm or gloo or nccl or cuda for a process group"
    ):
        ExpertParallel(group, backend="reference", **SIZES)
    with ExpertParallel(group, capacity=6, **SMALL) as ep:
        with pytest.raises(ValueError if bad else EPPeerError, match="got 7 .. 7"):
            ep.dispatch(torch.ones(1, 2), ID + 7 * bad)
        with pytest.raises(EPOverflow, match="rank 0 would get 8"):
            ep.dispatch(torch.ones(2, 2), ID.expand(2, 1))
        rows = ep.dispatch(torch.ones(1, 2), ID)
        assert torch.equal(ep.combine(rows.x, rows.handle), torch.ones(1, 2))


def different_calls(group: dist.ProcessGroup, rank: int) -> None:
    ep = ExpertParallel(group, timeout=DEADLINE, **SMALL)
    rows = ep.dispatch(torch.ones(1, 2), ID)
    told = "different calls: rank 0 at the counts, rank 1 at the rows, rank 2 at the counts"
    with pytest.raises(EPMismatch, match=told):
        if rank == 1:
            ep.combine(rows.x, rows.handle)
        else:
            ep.dispatch(torch.ones(1, 2), ID)
    ep.close()


def ranks_go(groups: Groups, rank: int, told: Connection) -> None:
    """Rank 3 raises, then stops, rank 2 is killed; the others say so in time and go on."""

    def failure(world: int, kind: type, op: str, end) -> None:
        group = groups[world]
        ep = ExpertParallel(group, timeout=DEADLINE, **SMALL)
        rows = ep.dispatch(torch.ones(1, 2), ID) if op == "combine" else None
        dist.barrier(group)
        if rank == world - 1:
            return end(ep)
        start = time.monotonic()
        with pytest.raises(kind) as caught:
            if rows is None:
                ep.dispatch(torch.ones(1, 2), ID)
            else:
                ep.combine(rows.x, rows.handle)
        took = time.monotonic() - start
        assert world - 1 in caught.value.ranks, str(caught.value)
        assert f"rank {world - 1}" in str(caught.value)
        assert took < DEADLINE + 5 and (kind is EPRankLost or took > 0.8 * DEADLINE)
        with pytest.raises(EPMisuse, match="out of use"):
            ep.dispatch(torch.ones(1, 2), ID)
        ep.close()

    def refuses(ep: ExpertParallel) -> None:
        with pytest.raises(TypeError):
            ep.combine(None, None)  # type: ignore[arg-type]
        time.sleep(1.5 * DEADLINE)

    failure(4, EPTimeout, "combine", refuses)
    dist.barrier()
    failure(4, EPTimeout, "dispatch", lambda _: os.kill(os.getpid(), signal.SIGSTOP))
    with pytest.raises(EPTimeout, match="rank 3 did not come within 3 s") as caught:
        ExpertParallel(groups[4], timeout=DEADLINE, **SMALL)
    assert caught.value.ranks == (3,)
    failure(3, EPRankLost, "combine", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    check(random_case(7, 2), groups[2], rank, triple, "gloo")
    told.send("done")


def worker(rank: int, port: int, told: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    groups = {world: dist.new_group(list(range(world))) for world in range(1, PROCESSES + 1)}
    same_bits(groups, rank)
    dist.barrier()
    gradients(groups[4], rank)
    errors_of_all(groups[4], rank)
    if rank < 3:
        different_calls(groups[3], rank)
    dist.barrier()
    ranks_go(groups, rank, told)
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_processes_over_gloo():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(PROCESSES)]
    processes = [
        spawn.Process(target=worker, args=(rank, store.port, pipes[rank][1]))
        for rank in range(PROCESSES)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes[:3]:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL, None]
        assert all(pipe[0].poll() and pipe[0].recv() == "done" for pipe in pipes[:2])
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert not set(processes) & set(multiprocessing.active_children())


def test_a_group_is_needed():
    with pytest.raises(ValueError, match="call torch.distributed.init_process_group, or pass a"):
        ExpertParallel(**SMALL)
    with pytest.raises(TypeError, match="ProcessGroup or a rank of a LocalWorld, got int"):
        ExpertParallel(3, **SMALL)  # type: ignore[arg-type]
