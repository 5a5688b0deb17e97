# SPDX-License-Identifier: MIT
"""MuonClip over ranks of which one has other groups, stands still or is gone: an error on all the
others, within the time of their group, and no hang. Over a process group and on DTensors."""

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from kimi_ops import MuonClip
from kimi_ops.optim.muon_mesh import local
from tests.dist.world import launch

PROCESSES = 3
WAYS = ("group", "mesh")
SECONDS = 5  # of the groups that meet a fault


def build(way: str, group: dist.ProcessGroup, count: int = 4, **keys) -> MuonClip:
    tensors = [torch.ones(8, 8) for _ in range(count)]
    if way == "group":
        keys["process_group"] = group
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        tensors = [distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for x in tensors]
    params = [nn.Parameter(x) for x in tensors]
    for param in params:
        param.grad = torch.ones_like(param)
    return MuonClip(params, **keys)


def refuse(ways: Iterable[MuonClip]) -> None:
    began = time.monotonic()
    for optimizer in ways:
        with pytest.raises(RuntimeError):
            optimizer.step()
    assert time.monotonic() - began < 30


def stop(folder: str) -> None:
    """Stand still, to wake when the two others have been told, or in a minute if they are not."""
    wait = f"for i in $(seq 300); do [ -e {folder}/0 -a -e {folder}/2 ] && break; sleep 0.2; done"
    subprocess.Popen(["sh", "-c", f"{wait}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def worker(rank: int, folder: str, fault: str) -> None:
    # Made once: of equal meshes torch may take the one that it has seen before, and its groups.
    groups = {way: dist.new_group(timeout=timedelta(seconds=SECONDS)) for way in WAYS}
    for way, group in groups.items():
        for count, decay, expected in (
            (2, 0.1 * (rank == 1), "other ones from parameter 0 of 2 on"),
            (1 + (rank == 2), 0.0, "from 1 to 2 parameters"),
        ):
            optimizer = build(way, group, count, weight_decay=decay)
            with pytest.raises(ValueError, match=expected):
                optimizer.step()
            for param in optimizer.param_groups[0]["params"]:
                assert (local(param) == 1).all()
    optimizers = [build(way, group) for way, group in groups.items()]
    for optimizer in optimizers:
        optimizer.step()
    dist.barrier()
    if rank == 1 and fault == "gone":
        os._exit(0)
    if rank == 1:
        stop(folder)
    refuse(optimizers)  # the one that stood still wakes to an error, too
    Path(folder, str(rank)).touch()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "told"), [("gone", "02"), ("still", "012")])
def test_a_rank_that_fails_is_an_error_on_all_others(fault: str, told: str, tmp_path: Path):
    launch(partial(worker, fault=fault), tmp_path, PROCESSES)
    assert sorted(path.name for path in tmp_path.glob("?")) == list(told)
