# SPDX-License-Identifier: MIT
"""The `gloo` and `nccl` backends: `all_to_all_single` of torch.distributed, on any number of hosts.

The ranks of the caller's group get a communicator of their own, so that nothing else runs between
their exchanges and that the deadline is theirs. NCCL has not run yet; there rows that do not come
end by its watchdog, not by an `EPTimeout`.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.choices import Backend
from kimi_ops.parallel.errors import EPError
from kimi_ops.parallel.liveness import Part, Roll

BACKENDS = get_args(Backend)
_GROUPS = ("gloo", "nccl")  # of torch.distributed


class GroupTransport:
    """One rank's connection to the ranks of a process group."""

    def __init__(self, roll: Roll | Part, name: str, timeout: float, device: torch.device) -> None:
        self.name, self.device, self._roll, self._timeout = name, device, roll, timeout
        self.rank, self.world = roll.rank, roll.world
        self._parts: list[GroupTransport] = []
        self._peers: Any = self._told("ExpertParallel", lambda: self._connect(timeout))
        # NCCL makes only the stream wait, unless it is given a time
        self._patience = [timedelta(seconds=timeout)] if name == "nccl" else []

    def _connect(self, timeout: float) -> Any:
        """Not by new_group, whose names depend on what other groups every rank has made."""
        ranks, deadline = (self._roll.store, self.rank, self.world), timedelta(seconds=timeout)
        if self.name == "gloo":
            return dist.ProcessGroupGloo(*ranks, deadline)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = deadline
        return dist.ProcessGroupNCCL(*ranks, options)

    def part(self, members: Sequence[int]) -> "GroupTransport":
        assert isinstance(self._roll, Roll)
        roll = self._roll.part(members, self._failure)
        self._parts.append(GroupTransport(roll, self.name, self._timeout, self.device))
        return self._parts[-1]

    def gather(self, message: Tensor) -> Tensor:
        found = [torch.empty_like(message) for _ in range(self.world)]
        self._told(
            "the counts", lambda: self._peers.allgather([found], [message]).wait(*self._patience)
        )
        return torch.stack(found).cpu()

    def start(
        self, buffer: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Callable[[], Tensor]:
        arrived = buffer.new_empty(sum(received))
        sizes = list(received), list(sent)
        work = self._told("the rows", lambda: self._peers.alltoall_base(arrived, buffer, *sizes))

        def wait() -> Tensor:
            self._told("the rows", work.wait)
            return arrived

        return wait

    def close(self) -> None:
        for part in self._parts:
            part.close()
        if self._peers is not None:
            self._peers.shutdown()
        self._peers = None

    def _told(self, op: str, call: Callable[[], Any]) -> Any:
        """The result of a call, its failure as an error that names ranks."""
        try:
            return call()
        except EPError:
            raise
        except RuntimeError as error:
            raise self._failure(op, error) from error

    def _failure(self, op: str, error: Exception) -> EPError:
        for part in self._parts:  # who waits for this rank there must not wait for its deadline
            part.close()
        return self._roll.error(op, error)


def choose(
    group: dist.ProcessGroup, device: torch.device | None, backend: str
) -> tuple[str, torch.device, str]:
    """(backend, device, why) for the ranks of `group`; None and "auto" leave a choice."""
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError("ExpertParallel: backend: expected one of this torch, got nccl; use gloo")
    configured = str(dist.get_backend_config(group))  # "cpu:gloo,cuda:nccl"
    offered = dict(part.split(":") for part in configured.split(","))
    if device is None:
        wanted = backend == "cuda" or "nccl" in (offered.get("cuda"), backend)
        with_gpu = torch.cuda.is_available() and wanted
        device = torch.device("cuda" if with_gpu and backend not in ("shm", "gloo") else "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if backend != "auto":
        return backend, device, "it was asked for"
    name = offered.get(device.type)
    if name not in _GROUPS:
        raise ValueError(
            f"ExpertParallel: group: expected a backend of {', '.join(_GROUPS)} for {device.type} "
            f"tensors, got {configured}; backend='gloo' makes one beside it"
        )
    return name, device, f"the group has {configured}, tensors are on {device.type}"
