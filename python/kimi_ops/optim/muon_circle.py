# SPDX-License-Identifier: MIT
"""Ranks that share parameters: what they tell each other on their hosts, and who failed to come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.parallel.errors import EPError, numbered
from kimi_ops.parallel.liveness import Roll, process

_TEXT = 256  # bytes of a process


class Circle:
    """A process group, as MuonClip uses it.

    Collective to make: every rank tells of its process, so that one that ends is known. Numbers of
    the host never pass a device: beside NCCL they take gloo, one of their own where the group has
    none.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self.step = 0
        self._members = dist.get_process_group_ranks(group)
        limit = _limit(group)
        self._roll = Roll(group, limit.total_seconds(), None)
        with self.told("making the optimizer's connection"):
            self._host = _host_of(group, self._roll, limit)
        text = json.dumps(process()).encode().ljust(_TEXT)
        found = self.each(torch.tensor(list(text), dtype=torch.uint8, device="cpu"), "processes")
        self._roll.know([json.loads(bytes(row)) for row in found.tolist()])

    def each(self, numbers: Tensor, what: str) -> Tensor:
        """The numbers [n] of all ranks, [P, n], on the host. By all-to-all, in which every rank has
        to do with every other: where one has ended all others learn of it at once."""
        found = numbers.new_empty(self.world, numbers.numel())
        with self.told(what):
            self._host.alltoall_base(found, numbers.repeat(self.world, 1), [], []).wait()
        return found

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """An exchange; its failure is an error that names ranks by their global numbers."""
        try:
            yield
        except EPError:
            raise
        except RuntimeError as error:
            with numbered(self._members):
                text = RuntimeError(f"{what}: {error}")
                raise self._roll.error(f"MuonClip: step {self.step}", text) from error


def _host_of(group: dist.ProcessGroup, roll: Roll, limit: timedelta) -> Any:
    """What carries tensors of the host between the ranks of a group."""
    if torch.device("cpu") in group._device_types:
        return group
    return dist.ProcessGroupGloo(roll.store, roll.rank, roll.world, limit)


def _limit(group: dist.ProcessGroup) -> timedelta:
    """After which a group gives an exchange up."""
    backend = group._get_backend(group._device_types[0])
    options: Any = getattr(backend, "options", None)  # a backend from elsewhere may have none
    limit: timedelta = getattr(options, "_timeout", dist.default_pg_timeout)
    return limit
