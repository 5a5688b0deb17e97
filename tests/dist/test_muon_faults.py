# SPDX-License-Identifier: MIT
"""MuonClip over ranks of which one has other groups, stands still or is gone: an error on all the
others that names it, within the time of their group, and no hang. Over a process group and on
DTensors."""

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from kimi_ops import MuonClip
from kimi_ops.optim.muon_mesh import local
from kimi_ops.parallel import EPError, EPRankLost, EPTimeout
from tests.dist.world import launch

WAYS = ("group", "mesh")
SECONDS = 5  # of the groups that meet a fault


def build(
    way: str, group: dist.ProcessGroup, count: int = 4, place: Placement | None = None, **keys
) -> MuonClip:
    place = Shard(0) if place is None else place
    tensors = [torch.ones(8, 8) for _ in range(count)]
    if way == "group":
        keys["process_group"] = group
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        tensors = [distribute_tensor(x, mesh, [place], src_data_rank=None) for x in tensors]
    params = [nn.Parameter(x) for x in tensors]
    for param in params:
        param.grad = torch.ones_like(param)
    return MuonClip(params, **keys)


def refuse(
    ways: dict[str, MuonClip], expected: type[EPError], number: int, details: dict[str, str]
) -> None:
    """Every step raises in time and names rank 1; both at once, for each waits for its group."""

    def step(optimizer: MuonClip) -> EPError:
        with pytest.raises(EPError) as caught:
            optimizer.step()
        return caught.value

    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(step, ways.values()))
    assert time.monotonic() - began < 6 * SECONDS
    for way, error in zip(ways, errors, strict=True):
        assert type(error) is expected and error.ranks == (1,), repr(error)
        told = rf"^MuonClip: step {number}: .*rank 1 .*\({details[way]}: "
        assert re.search(told, str(error)), error


def stop(folder: str, others: int) -> None:
    """Stand still, to wake when all others have been told, or in a minute if they are not."""
    told = f"[ $(ls {folder} | grep -c told) = {others} ]"
    wait = f"for i in $(seq 300); do {told} && break; sleep 0.2; done"
    subprocess.Popen(["sh", "-c", f"{wait}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def differ(rank: int, groups: dict[str, dist.ProcessGroup]) -> None:
    odd = rank == 1
    for way, group in groups.items():
        cases: list[tuple[str, dict[str, Any]]] = [
            ("other ones from parameter 0 of 2 on", {"count": 2, "weight_decay": 0.1 * odd}),
            ("from 1 to 2 parameters", {"count": 1 + odd}),
        ]
        if way == "mesh":
            place = Replicate() if odd else Shard(0)
            cases.append(("other ones from parameter 0 of 2 on", {"count": 2, "place": place}))
        for expected, keys in cases:
            optimizer = build(way, group, **keys)
            with pytest.raises(ValueError, match=expected):
                optimizer.step()
            for param in optimizer.param_groups[0]["params"]:
                assert (local(param) == 1).all()


def worker(rank: int, folder: str, fault: str, place: str) -> None:
    # Made once: of equal meshes torch may take the one that it has seen before, and its groups.
    world = dist.get_world_size()
    members = range(place == "first", world)  # then rank 1 is number 0 of its groups
    limit = timedelta(seconds=SECONDS)
    groups = {way: dist.new_group(list(members), timeout=limit) for way in WAYS}
    if rank not in members:
        Path(folder, f"told {rank}").touch()
        os._exit(0)
    optimizers = {way: build(way, group) for way, group in groups.items()}
    if place != "first":
        differ(rank, groups)
        for optimizer in optimizers.values():
            optimizer.step()
        dist.barrier()

    def fail(*_: object, **__: object) -> None:
        if fault == "gone":
            os._exit(0)
        stop(folder, world - 1)

    if rank == 1 and place == "within":
        dist.all_gather = fail  # type: ignore[assignment]
    elif rank == 1:
        fail()
    if rank == 1:  # the one that stood still wakes to an error, too
        for optimizer in optimizers.values():
            with pytest.raises(EPError):
                optimizer.step()
    else:
        first = "processes" if place == "first" else "the presence of gradients"
        details = dict.fromkeys(WAYS, first)
        if place == "within":  # of the first step
            details["group"] = "squared norms"
        expected = EPRankLost if fault == "gone" else EPTimeout
        refuse(optimizers, expected, 0 if place == "first" else 2, details)
    Path(folder, f"told {rank}").touch()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "place", "fault"),
    [
        (2, "within", "gone"),
        (2, "within", "still"),
        (4, "first", "gone"),
        (4, "before", "gone"),
        (4, "before", "still"),
        (4, "within", "gone"),  # of which the last rank learns after its time
    ],
)
def test_a_rank_that_fails_is_named_by_all_others(
    processes: int, place: str, fault: str, tmp_path: Path
):
    launch(partial(worker, fault=fault, place=place), tmp_path, processes)
    told = sorted(int(path.name.split()[1]) for path in tmp_path.glob("told *"))
    assert told == [rank for rank in range(processes) if rank != 1 or fault == "still"]
