# SPDX-License-Identifier: MIT
"""ExpertParallel over shared memory between processes: ranks that stop, are killed, slow, raise or
close at each point, memory that is not there, ranks that cannot share it; and nothing left behind.

Three processes. What ends a rank happens to a child of the last one, which plays it meanwhile."""

import gc
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kimi_ops import ExpertParallel
from kimi_ops.parallel import (
    EPError,
    EPMismatch,
    EPMisuse,
    EPRankLost,
    EPTimeout,
    liveness,
    segment,
)
from tests.dist.all_to_all_cases import check, random_case, triple
from tests.dist.world import _start

RANKS = 3
LAST = RANKS - 1
DEADLINE = 1.5
NOTICE = 1.0  # until a rank that ended is noticed, on a busy machine
ENDS = 150.0  # of the whole test
_OURS = re.compile("memfd:kimi_ops|pidfd")
ID = torch.zeros(1, 1, dtype=torch.int32)
X = torch.ones(1, 2)
POINTS = ("before dispatch", "in dispatch", "between", "in combine")


def make(**more) -> ExpertParallel:
    sizes = {"num_experts": 4, "hidden": 2, "max_tokens_per_rank": 8, "timeout": DEADLINE}
    return ExpertParallel(**{**sizes, "backend": "shm", **more})


def play(ep: ExpertParallel, point: str, strike: Callable[[], None]) -> None:
    """Dispatch and combine, with a strike at the point."""

    def begin(*_: object) -> None:
        strike()
        raise AssertionError("a strike that did nothing")

    if point == "before dispatch":
        strike()
    if point == "in dispatch":
        ep._connection.transport.begin = begin  # behind the counts, before the rows
    rows = ep.dispatch(X, ID)
    if point == "between":
        strike()
    if point == "in combine":
        ep._connection.transport.begin = begin
    ep.combine(rows.x, rows.handle)


def raises() -> None:
    raise KeyError("the cause")


STRIKES: dict[str, tuple[Callable[[], None], type[EPError]]] = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), EPRankLost),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), EPTimeout),
    "slow": (lambda: time.sleep(10 * DEADLINE), EPTimeout),
    "raises": (raises, EPRankLost),
}


@contextmanager
def a_child(play_rank: Callable[[], None]):
    """A child of this process that plays its rank."""
    child = os.fork()
    if child == 0:
        try:
            play_rank()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def strikes(rank: int) -> None:
    for how, (strike, kind) in STRIKES.items():
        for point in POINTS:
            if rank == LAST:
                with a_child(lambda: play(make(), point, strike)):  # noqa: B023
                    dist.barrier()
                continue
            with make() as ep:
                start = time.monotonic()
                with pytest.raises(kind, match=f"rank {LAST}") as caught:
                    play(ep, "", raises)
                took = time.monotonic() - start
                assert caught.value.ranks == (LAST,), (how, point, str(caught.value))
                most = NOTICE if kind is EPRankLost else DEADLINE + NOTICE
                assert took < most and (kind is EPRankLost or took > 0.8 * DEADLINE), (how, took)
                with pytest.raises(EPMisuse, match="out of use"):
                    ep.dispatch(X, ID)
            dist.barrier()


def other_calls(rank: int) -> None:
    with make(timeout=60.0) as ep:
        rows = ep.dispatch(X, ID)
        dist.barrier()
        start = time.monotonic()
        with pytest.raises(EPMismatch, match=r"different calls"):
            ep.combine(rows.x, rows.handle) if rank == 1 else ep.dispatch(X, ID)
        assert time.monotonic() - start < 5
    dist.barrier()
    with make(timeout=60.0) as ep:
        rows = ep.dispatch(X, ID)
        told = "rank 0: dispatch of .*; rank 1: combine of "
        with pytest.raises(EPMismatch, match=told) as caught:
            if rank == 1:
                ep.combine(rows.x, rows.handle)
            else:
                ep.dispatch(X, handle=rows.handle)
        assert caught.value.ranks == (0, 1, 2)
    dist.barrier()
    with make() as ep:  # slow, but in time
        if rank == 0:
            time.sleep(0.5 * DEADLINE)
        ep.dispatch(X, ID)
        if rank == 1:
            return
        with pytest.raises(EPRankLost, match="rank 1 closed the connection") as caught:
            ep.dispatch(X, ID)
        assert caught.value.ranks == (1,)


def no_memory(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 1 << 20
    with make(max_tokens_per_rank=tokens, hidden=1 << 14) as ep:
        x = torch.zeros(1, 1).expand(tokens, 1 << 14)  # 64 GB a rank, of which there are 4 bytes
        with pytest.raises(EPError, match=r"no shared memory left for \d{12} bytes") as caught:
            ep.dispatch(x, ID.expand(tokens, 1))
        assert caught.value.ranks == (0, 1, 2)
    with monkeypatch.context() as patched, make(max_tokens_per_rank=tokens) as ep:
        if rank == 1:
            patched.setattr(segment, "available_memory", lambda: 0)
        with pytest.raises(EPError, match="rank 1: no shared memory left") as caught:
            ep.dispatch(X.expand(tokens, 2), ID.expand(tokens, 1))
        assert caught.value.ranks == (1,)
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(EPError, match="rank 0: .*No space left"):
            make()


def apart(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        if rank == 1:
            patched.setattr(liveness, "_host", lambda: ("another", "pid:[1]"))
        with pytest.raises(EPError, match="expected ranks that share memory: rank") as caught:
            make()
        assert ("rank 1 on another host" in str(caught.value)) == (rank != 1)
        with make(backend="auto") as ep:
            assert ep.backend == "gloo" and "no shared memory: rank" in ep.backend_reason
            assert torch.equal(ep.dispatch(X, ID).x[:1], X) or rank > 0
    with monkeypatch.context() as patched:
        if rank == 1:

            def hidden(*_: object) -> int:
                raise PermissionError(13, "Permission denied", "/proc/1/fd/3")

            patched.setattr(os, "pidfd_open", hidden)
        with make(backend="auto") as ep:
            assert ep.backend == "gloo" and "rank 1: [Errno 13]" in ep.backend_reason


def descriptors() -> list[str]:
    """The memory and the processes that this process has open."""
    gc.collect()  # errors that were caught hold what they came through
    return [link for link in map(_link, Path("/proc/self/fd").iterdir()) if _OURS.search(link)]


def worker(rank: int, folder: str) -> None:
    os.setsid()  # by which its children are found
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    monkeypatch = pytest.MonkeyPatch()
    for seed in range(6):
        check(random_case(3000 + seed, RANKS), dist.group.WORLD, rank, triple)
    with make(backend="auto") as ep:
        assert ep.backend == "shm" and "all 3 ranks are on this host" in ep.backend_reason
        assert descriptors()
    assert not descriptors()
    make()  # closed by nobody
    assert not descriptors()
    strikes(rank)
    other_calls(rank)
    dist.barrier()
    no_memory(rank, monkeypatch)
    apart(rank, monkeypatch)
    assert not descriptors()
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_go_and_nothing_is_left(tmp_path):
    running = mp.start_processes(
        _start, (worker, str(tmp_path)), RANKS, join=False, start_method="forkserver"
    )
    ends = time.monotonic() + ENDS
    try:
        while not running.join(timeout=max(0.0, ends - time.monotonic())):
            assert time.monotonic() < ends, "the ranks hang"
    finally:
        for process in running.processes:
            process.kill()
            process.join()
    left = [path for path in Path("/proc").glob("[0-9]*") if _session(path) in running.pids()]
    assert not left and not [name for name in os.listdir("/dev/shm") if "kimi" in name]


def _session(path: Path) -> int | None:
    """Of a process that is still there."""
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return None


def _link(path: Path) -> str:
    """Where a descriptor leads to, if it is still there."""
    try:
        return os.readlink(path)
    except OSError:
        return ""
