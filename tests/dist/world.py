# SPDX-License-Identifier: MIT
"""Processes with gloo over loopback, forked from a server that has imported torch once."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
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


def started(processes: int, *words: str) -> subprocess.Popen[str]:
    """A program under torchrun, all that it prints in one pipe; `words` are its file, or -m and its
    module, and its arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.Popen(
        [*command, str(processes), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def torchrun(processes: int, *words: str) -> str:
    """What such a program prints to its end."""
    process = started(processes, *words)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def alone(folder: Path, *words: str) -> str:
    """The same of a Python file as the only process, which is forked."""
    fork(_script, 1, folder / "printed", *words)
    return (folder / "printed").read_text()


def _script(rank: int, printed: Path, *words: str) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    sys.argv = list(words)
    with printed.open("w") as file, redirect_stdout(file):
        runpy.run_path(words[0], run_name="__main__")
