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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.parallel import messages

ALIGNMENT = 128  # of buffers
# kimi_all_to_all_state: epoch, masked, silent, strange, overfull, (arrivals, most)
STATE_WORDS = 6
_MASKED, _SILENT, _STRANGE, _OVERFULL, _MOST = 1, 2, 3, 4, 5


class Faults(NamedTuple):
    """What kernels have found of the members, by their places among them."""

    silent: list[int]  # those that did not come
    strange: list[int]  # those that did something else
    overfull: list[int]  # those that have too little room
    most: int  # rows that one of these would have had


@dataclass(eq=False)
class PeerMemory:
    """What one rank has of it; `members` are the ranks that are left of those of the table."""

    rank: int
    table: Tensor  # [P] int64, on the device: where each rank's buffer lies for this one
    bytes: int  # of a buffer
    kept: Any  # what owns the memory
    members: Sequence[int]
    state: Tensor = field(init=False)  # [6] int64, on the device
    _seen: Tensor = field(init=False)  # the state as the host knows it

    def __post_init__(self) -> None:
        self.state = self.table.new_zeros(STATE_WORDS)
        masked = sum(1 << r for r in range(len(self.table)) if r not in self.members)
        self.state[_MASKED] = masked - (masked >> 63 << 64)  # the bits as int64
        self._seen = torch.zeros(STATE_WORDS, dtype=torch.int64, pin_memory=self.table.is_cuda)

    def faults(self, wait: bool = False) -> Faults:
        """What was found, as far as is known: of a GPU nothing is awaited, a later call sees it."""
        self._seen.copy_(self.state, non_blocking=not wait)
        state = self._seen.tolist()
        silent, strange, overfull = (
            [i for i, rank in enumerate(self.members) if state[word] >> rank & 1]
            for word in (_SILENT, _STRANGE, _OVERFULL)
        )
        return Faults(silent, strange, overfull, most=state[_MOST] >> 32)


Provider = Callable[[int], PeerMemory]  # of so many bytes a rank; all ranks call it


def slices(world: int, size: int, device: torch.device, members: Sequence[int]) -> list[PeerMemory]:
    """The memory of all ranks of one process."""
    size = -(-size // ALIGNMENT) * ALIGNMENT
    whole = torch.zeros(world * size + ALIGNMENT, dtype=torch.uint8, device=device)
    first = -(-whole.data_ptr() // ALIGNMENT) * ALIGNMENT
    table = _table([first + rank * size for rank in range(world)], device)
    return [PeerMemory(rank, table, size, whole, members) for rank in range(world)]


def symmetric(group: dist.ProcessGroup, size: int, device: torch.device) -> PeerMemory:
    """By torch.distributed._symmetric_memory, whose memory is mapped in all ranks of the group."""
    import torch.distributed._symmetric_memory as symm_mem

    buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
    mapped = symm_mem.rendezvous(buffer, group)
    buffer.zero_()  # before any rank writes to another's
    torch.cuda.synchronize(device)
    dist.barrier(group)
    table = _table(mapped.buffer_ptrs, device)
    return PeerMemory(group.rank(), table, size, (buffer, mapped), range(group.size()))


def shared(
    talk: Any, world: int, size: int, device: torch.device, members: Sequence[int]
) -> PeerMemory:
    """By CUDA's interprocess handles: members of one host, whose GPUs reach each other."""
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # zero before any rank writes to another's
    own = buffer.untyped_storage()
    # (device, handle, bytes, offset, reference counter and its offset, event, whether it waits)
    words = messages.text([v.hex() if isinstance(v, bytes) else v for v in own._share_cuda_()])
    addresses, storages = [0] * world, [own]
    for rank, handle in zip(members, messages.texts(talk.gather(words)), strict=True):
        storage = own
        if rank != members[talk.rank]:
            parts = (bytes.fromhex(v) if isinstance(v, str) else v for v in handle[1:])
            # on this rank's device, whichever the owner's is: the driver lets them reach it
            storage = torch.UntypedStorage._new_shared_cuda(device.index, *parts)
            storages.append(storage)
        addresses[rank] = storage.data_ptr()
    table = _table(addresses, device)
    return PeerMemory(members[talk.rank], table, size, storages, members)


def _table(addresses: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(addresses), dtype=torch.int64, device=device)
