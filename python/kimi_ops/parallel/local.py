# SPDX-License-Identifier: MIT
"""Any number of ranks in one process: the `reference` backend, a thread for each rank."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.parallel.errors import EPMismatch, EPRankLost, EPTimeout, named, numbered

Result = TypeVar("Result")


class LocalWorld:
    """Ranks that are threads of this process, to test and to debug expert parallelism with.

    ``world.run(function)`` calls ``function(group)`` once a rank; `ExpertParallel` takes the group
    in place of a process group, on whatever device the tensors are.

    Parameters
    ----------
    size : int
        P, the number of ranks.
    streams : bool
        Every rank has a CUDA stream of its own, and the backend cuda launches its kernels there, as
        processes do; otherwise one launch serves all ranks. Gradients on a GPU need it: autograd
        runs the backward of all ranks in one thread, where none can wait for another.

    Raises
    ------
    TypeError, ValueError
        Not a number of ranks.

    Examples
    --------
    >>> from kimi_ops import LocalWorld
    >>> LocalWorld(3).run(lambda group: group.rank)
    [0, 1, 2]
    """

    def __init__(self, size: int, *, streams: bool = False) -> None:
        _check.between("LocalWorld", "size", size, 1, 1024)
        # streams beyond those share one, and a rank would wait for what is queued behind it
        most = int(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8"))
        if streams and size > most:
            raise ValueError(
                f"LocalWorld: streams: expected at most {most} ranks, got {size}; raise "
                "CUDA_DEVICE_MAX_CONNECTIONS (up to 32) before CUDA starts"
            )
        self.size, self.streams = size, streams
        self._mail: dict[tuple[Any, ...], Any] = {}
        self._changed = threading.Condition()
        self._gone: set[int] = set()

    def run(self, function: Callable[["LocalGroup"], Result]) -> list[Result]:
        """Call ``function(group)`` on every rank at once.

        Returns
        -------
        list
            What the ranks returned.

        Raises
        ------
        Exception
            That of the lowest rank which failed by itself: ranks that waited for it in vain come
            second.

        Notes
        -----
        The caller's gradient mode holds in all ranks. A rank that returns or raises is gone:
        whoever waits for it gets `EPRankLost` at once.
        """
        results: dict[int, Result] = {}
        errors: dict[int, BaseException] = {}
        self._gone, self._mail = set(), {}
        graded, streams = torch.is_grad_enabled(), self._own_streams()

        def work(rank: int) -> None:
            try:
                with torch.set_grad_enabled(graded), torch.cuda.stream(streams[rank]):
                    results[rank] = function(LocalGroup(self, rank))
            except BaseException as error:
                errors[rank] = error
            with self._changed:
                self._gone.add(rank)
                self._changed.notify_all()

        names = [f"rank {rank} of {self.size}" for rank in range(self.size)]
        threads = [
            threading.Thread(target=work, args=(rank,), name=name, daemon=True)
            for rank, name in enumerate(names)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stream in filter(None, streams):
            torch.cuda.current_stream().wait_stream(stream)
        if errors:
            waited = (EPRankLost, EPTimeout)
            first = min(errors, key=lambda rank: (isinstance(errors[rank], waited), rank))
            errors[first].add_note(f"on rank {first} of a LocalWorld of {self.size}")
            raise errors[first]
        return [results[rank] for rank in range(self.size)]

    def _own_streams(self) -> list[torch.cuda.Stream | None]:
        """Of every rank, behind what the caller's stream has so far."""
        if not (self.streams and torch.cuda.is_available()):
            return [None] * self.size
        made = [torch.cuda.Stream() for _ in range(self.size)]
        for stream in made:
            stream.wait_stream(torch.cuda.current_stream())
        return [*made]

    def _post(self, key: tuple[Any, ...], message: Any) -> None:
        with self._changed:
            self._mail[key] = message
            self._changed.notify_all()

    def _take(
        self, keys: dict[int, tuple[Any, ...]], timeout: float, members: Sequence[int]
    ) -> list[Any]:
        """The messages of members, by their keys."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while missing := [rank for rank, key in keys.items() if key not in self._mail]:
                if lost := [rank for rank in missing if members[rank] in self._gone]:
                    raise EPRankLost(f"{named(lost)} ended before its part of the exchange", lost)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise EPTimeout(f"{named(missing)} did not come within {timeout:g} s", missing)
                self._changed.wait(left)
            return [self._mail.pop(key) for key in keys.values()]


@dataclass
class LocalGroup:
    """One rank of a `LocalWorld`, for the thread that is this rank."""

    world: LocalWorld
    rank: int
    _numbers: Any = field(default_factory=itertools.count)

    @property
    def size(self) -> int:
        return self.world.size


class LocalTransport:
    name = "reference"

    def __init__(
        self,
        group: LocalGroup,
        timeout: float,
        device: torch.device,
        members: Sequence[int] | None = None,
    ) -> None:
        members = range(group.size) if members is None else members
        self.rank, self.world, self.device = members.index(group.rank), len(members), device
        self._group, self._timeout, self._members = group, timeout, members
        self._mailbox = group.world
        # each rank makes its transports, and a transport its exchanges, in the same order
        self._connection = (*members, next(group._numbers))
        self._calls = itertools.count()

    def part(self, members: Sequence[int]) -> "LocalTransport":
        ours = [self._members[rank] for rank in members]
        return LocalTransport(self._group, self._timeout, self.device, ours)

    def gather(self, message: Tensor) -> Tensor:
        whole = message.cpu()
        sizes = [whole.numel()] * self.world
        parts = self._exchange(whole.repeat(self.world), sizes, sizes)
        return torch.stack(parts())

    def start(
        self, buffer: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Callable[[], Tensor]:
        parts = self._exchange(buffer, sent, received)

        def arrived() -> Tensor:
            with numbered(self._members):
                return torch.cat(parts())

        return arrived

    def share(self, value: Any) -> list[Any]:
        """What all ranks have, by rank: the very objects."""
        call = (self._connection, next(self._calls))
        for rank in range(self.world):
            self._mailbox._post((*call, self.rank, rank), value)
        return self._mailbox._take(
            {rank: (*call, rank, self.rank) for rank in range(self.world)},
            self._timeout,
            self._members,
        )

    def close(self) -> None:
        pass

    def _exchange(
        self, buffer: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Callable[[], list[Tensor]]:
        call = (self._connection, next(self._calls))
        for rank, part in enumerate(buffer.split(list(sent))):
            self._mailbox._post((*call, self.rank, rank), part)
        keys = {rank: (*call, rank, self.rank) for rank in range(self.world)}

        def arrived() -> list[Tensor]:
            parts = self._mailbox._take(keys, self._timeout, self._members)
            found = [part.numel() if part.dtype == buffer.dtype else -1 for part in parts]
            if others := [r for r, n in enumerate(found) if n != received[r]]:
                raise EPMismatch(
                    f"{named(others)} made another call than {named([self.rank])}", others
                )
            return parts

        return arrived
