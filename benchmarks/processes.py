# SPDX-License-Identifier: MIT
"""Ranks of a benchmark, each a process of this machine, and what their ways take in turns."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

LEAST, MOST = 9, 300  # rounds
Case = TypeVar("Case")


def told(
    work: Callable[..., object], cases: Sequence[Case], ranks: int, *arguments: Any
) -> Iterator[tuple[Case, Any]]:
    """Each case, and what rank 0 found of it: work(rank, case, *arguments) in processes that take
    the cases one after another; JSON knows its values."""
    with tempfile.TemporaryDirectory() as folder:
        given = folder, work, cases, ranks, arguments
        mp.start_processes(_work, given, ranks, start_method="spawn")
        for number, case in enumerate(cases):
            yield case, json.loads(Path(folder, f"{number}.json").read_text())


def _work(
    rank: int, folder: str, work: Callable[..., object], cases: Sequence[Any], ranks: int,
    arguments: Sequence[Any],
) -> None:  # fmt: skip
    _join(rank, folder, ranks)
    for number, case in enumerate(cases):
        found = work(rank, case, *arguments)
        if rank == 0:
            Path(folder, f"{number}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _join(rank: int, folder: str, world: int) -> None:
    """Join the group of all ranks, on cores of the rank's own, as launchers do it."""
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[rank::world] or [cores[rank % len(cores)]]
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(len(mine))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def samples(
    ways: Sequence[Callable[[], object]], budget: float, wait: Callable[[], None] = lambda: None
) -> list[list[list[float]]]:
    """[ways][2][rounds]: seconds and seconds of processor time of the slowest rank.

    The ways take turns, each behind a barrier, for `budget` seconds each; `wait` waits for a
    device. All ranks call this.
    """

    def round_of() -> Tensor:
        times = []
        for way in ways:
            wait()
            dist.barrier()
            worked, start = time.process_time(), time.perf_counter()
            way()
            wait()
            times.append([time.perf_counter() - start, time.process_time() - worked])
        return torch.tensor(times, dtype=torch.float64)

    def slowest(times: Tensor) -> Tensor:
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return times

    for _ in range(2):
        once = slowest(round_of())
    rounds = int(min(MOST, max(LEAST, len(ways) * budget / once[:, 0].sum())))
    found = slowest(torch.stack([round_of() for _ in range(rounds)])).permute(1, 2, 0)
    listed: list[list[list[float]]] = found.tolist()
    return listed
