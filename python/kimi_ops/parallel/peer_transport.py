# SPDX-License-Identifier: MIT
"""The connection of the `cuda` backend: who launches the kernels, and where the memory is from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops import _native
from kimi_ops.parallel.errors import EPMismatch, named
from kimi_ops.parallel.liveness import Roll
from kimi_ops.parallel.local import LocalGroup, LocalTransport
from kimi_ops.parallel.peer_memory import PeerMemory, Provider, shared, slices, symmetric
from kimi_ops.parallel.process_group import GroupTransport

Roles = dict[str, Tensor | None]  # in the order of the native function


class Launcher(Protocol):
    """What launches the kernels, of this rank or of all ranks of the process at once."""

    def __call__(
        self, op: str, memory: PeerMemory, numbers: Sequence[Any], roles: Roles
    ) -> None: ...


def launch(op: str, ranks: Sequence[tuple[PeerMemory, Sequence[Any], Roles]]) -> None:
    """One launch of ranks that are in this process: each with its memory and tensors."""
    memories, numbers = [memory for memory, _, _ in ranks], ranks[0][1]
    peers = (
        [memory.table for memory in memories], [memory.state for memory in memories],
        [memory.rank for memory in memories],
    )  # fmt: skip
    roles = ([each[name] for _, _, each in ranks if each[name] is not None] for name in ranks[0][2])
    getattr(_native.engine, op)(*peers, *numbers, *roles)


def alone(op: str, memory: PeerMemory, numbers: Sequence[Any], roles: Roles) -> None:
    launch(op, [(memory, numbers, roles)])


@dataclass(eq=False)
class PeerTransport:
    """One rank's connection: small messages go by the host, rows by the kernels."""

    talk: Any  # LocalTransport or GroupTransport, for the host's messages
    device: torch.device
    timeout: float
    ranks: int  # as kernels count them: with those that are masked
    members: Sequence[int]  # of these
    provide: Provider
    launcher: Launcher
    # Ranks have launches of their own on one GPU: one that waits must leave room for the others.
    crowded: bool = False
    name: str = "cuda"

    def __post_init__(self) -> None:
        self.rank, self.world = self.talk.rank, self.talk.world

    def gather(self, message: Tensor) -> Tensor:
        found: Tensor = self.talk.gather(message.cpu())
        return found

    def close(self) -> None:
        self.talk.close()


def in_one_process(
    group: LocalGroup, timeout: float, device: torch.device | None, members: Sequence[int]
) -> PeerTransport:
    """Ranks that are threads, on one GPU: one launch for all of them."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    talk = LocalTransport(group, timeout, torch.device("cpu"), members)

    def provide(size: int) -> PeerMemory:
        made = slices(group.size, size, device, members) if talk.rank == 0 else None
        memory: PeerMemory = talk.share(made)[0][group.rank]
        if device.type == "cuda":  # it is zero, and what was there before is read no more
            torch.cuda.synchronize(device)
        return memory

    apart = group.world.streams
    launcher: Launcher = alone if apart else Together(talk, device)
    return PeerTransport(talk, device, timeout, group.size, members, provide, launcher, apart)


def between_processes(
    group: dist.ProcessGroup,
    roll: Roll,
    timeout: float,
    device: torch.device,
    members: Sequence[int],
) -> PeerTransport:
    """Ranks that are processes, on the GPUs of one host."""
    talk, ranks = GroupTransport(roll, "gloo", timeout, torch.device("cpu")), group.size()
    places = roll.exchange("gpu", str(torch.cuda.get_device_properties(device).uuid))
    # torch's symmetric memory wants a GPU for each rank, and all ranks of the group
    whole = len(members) == ranks and len(set(places)) == ranks

    def provide(size: int) -> PeerMemory:
        if whole:
            return symmetric(group, size, device)
        return shared(talk, ranks, size, device, members)

    crowded = len(set(places)) < talk.world
    return PeerTransport(talk, device, timeout, ranks, members, provide, alone, crowded)


class Together:
    """The launcher of ranks that are threads: rank 0 launches for all."""

    def __init__(self, talk: LocalTransport, device: torch.device) -> None:
        self._talk, self._device = talk, device

    def __call__(self, op: str, memory: PeerMemory, numbers: Sequence[Any], roles: Roles) -> None:
        ranks = self._talk.share((op, memory, numbers, roles, self._event()))
        others = [rank for rank, (its, *_) in enumerate(ranks) if its != op]
        if others:
            raise EPMismatch(f"{op}: {named(others)} made another call", others)
        done = None
        if self._talk.rank == 0:
            for *_, ready in ranks:
                self._follow(ready)
            launch(op, [each[1:4] for each in ranks])
            done = self._event()
        self._follow(self._talk.share(done)[0])

    def _event(self) -> Any:
        gpu = self._device.type == "cuda"
        return torch.cuda.current_stream(self._device).record_event() if gpu else None

    def _follow(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
