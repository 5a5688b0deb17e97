# SPDX-License-Identifier: MIT
"""Memory that the ranks of an all-to-all on GPUs reach: a buffer of each rank, mapped in all.

    slices       ranks of one process on one GPU: parts of one allocation
    symmetric    torch's symmetric memory: one process a GPU, NVLink between them
    shared       the same by CUDA's own interprocess handles, where torch has no symmetric memory

Kernels see a table of addresses and nothing else. `symmetric` and `shared` are written for torch
2.13 and have not run: that takes a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 128  # of buffers
STATE_WORDS = 5  # kimi_all_to_all_state: epoch, masked, silent, strange, arrivals
_SILENT, _STRANGE = 2, 3


@dataclass(eq=False)
class PeerMemory:
    """What one rank has of it."""

    rank: int
    table: Tensor  # [P] int64, on the device: where each rank's buffer lies for this one
    bytes: int  # of a buffer
    kept: Any  # what owns the memory
    state: Tensor = field(init=False)  # [5] int64, on the device
    _seen: Tensor = field(init=False)  # the state as the host knows it

    def __post_init__(self) -> None:
        self.state = self.table.new_zeros(STATE_WORDS)
        self._seen = torch.zeros(STATE_WORDS, dtype=torch.int64, pin_memory=self.table.is_cuda)

    def faults(self) -> tuple[list[int], list[int]]:
        """The ranks that did not come, and those that did something else.

        Of a GPU nothing is awaited: what its kernels find is seen by a later call.
        """
        self._seen.copy_(self.state, non_blocking=True)
        state, world = self._seen.tolist(), range(len(self.table))
        silent, strange = ([r for r in world if state[i] >> r & 1] for i in (_SILENT, _STRANGE))
        return silent, strange


Provider = Callable[[int], PeerMemory]  # of so many bytes a rank; all ranks call it


def slices(world: int, size: int, device: torch.device) -> list[PeerMemory]:
    """The memory of all ranks of one process."""
    size = -(-size // ALIGNMENT) * ALIGNMENT
    whole = torch.zeros(world * size + ALIGNMENT, dtype=torch.uint8, device=device)
    first = -(-whole.data_ptr() // ALIGNMENT) * ALIGNMENT
    table = _table([first + rank * size for rank in range(world)], device)
    return [PeerMemory(rank, table, size, whole) for rank in range(world)]


def symmetric(group: dist.ProcessGroup, size: int, device: torch.device) -> PeerMemory:
    """By torch.distributed._symmetric_memory, whose memory is mapped in all ranks of the group."""
    import torch.distributed._symmetric_memory as symm_mem

    buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
    mapped = symm_mem.rendezvous(buffer, group)
    _clear(group, buffer)
    table = _table(mapped.buffer_ptrs, device)
    return PeerMemory(group.rank(), table, size, (buffer, mapped))


def shared(group: dist.ProcessGroup, size: int, device: torch.device) -> PeerMemory:
    """By CUDA's interprocess handles: ranks of one host, whose GPUs reach each other."""
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    _clear(group, buffer)
    handles: list[Any] = [None] * group.size()
    # (device, handle, bytes, offset, reference counter and its offset, event, whether it waits)
    dist.all_gather_object(handles, buffer.untyped_storage()._share_cuda_(), group=group)
    storages = [
        # opened on this rank's device, whichever the owner's is: the driver lets them reach it
        buffer.untyped_storage()
        if rank == group.rank()
        else torch.UntypedStorage._new_shared_cuda(device.index, *handle[1:])
        for rank, handle in enumerate(handles)
    ]
    table = _table([storage.data_ptr() for storage in storages], device)
    return PeerMemory(group.rank(), table, size, storages)


def _clear(group: dist.ProcessGroup, buffer: Tensor) -> None:
    """Zero before any rank writes to another's."""
    buffer.zero_()
    torch.cuda.synchronize(buffer.device)
    dist.barrier(group)


def _table(addresses: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(addresses), dtype=torch.int64, device=device)
