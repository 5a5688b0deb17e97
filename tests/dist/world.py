# SPDX-License-Identifier: MIT
"""Processes with gloo over loopback, forked from a server that has imported torch once."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(worker: Callable[[int, str], None], folder: Path, processes: int) -> None:
    """Run worker(rank, folder) in `processes` processes of one group; raises what one raised."""
    fork(_join, processes, worker, str(folder), processes)


def fork(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run function(rank, *arguments) in every process."""
    preload = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "kimi_ops"]
    preload += ["torch._dynamo", "kimi_ops.train"]  # an optimizer loads it: seconds a process
    multiprocessing.set_forkserver_preload(preload)
    mp.start_processes(_start, (function, *arguments), processes, start_method="forkserver")


def _start(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    function(rank, *arguments)


def join(rank: int, folder: str, processes: int) -> None:
    """Make the default group, of as many processes that were forked."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)


def _join(rank: int, worker: Callable[[int, str], None], folder: str, processes: int) -> None:
    join(rank, folder, processes)
    worker(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
