# SPDX-License-Identifier: MIT
"""One rank's connection: its backend, its buffers, and whether it still works."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.parallel import messages
from kimi_ops.parallel.errors import EPError, EPMisuse
from kimi_ops.parallel.local import LocalGroup, LocalTransport
from kimi_ops.parallel.process_group import GroupTransport, choose
from kimi_ops.parallel.transport import Transport

Result = TypeVar("Result")
_log = logging.getLogger("kimi_ops.parallel")


class Connection:
    """A transport that refuses calls out of turn; the first failure of an exchange is its last."""

    def __init__(
        self,
        group: dist.ProcessGroup | LocalGroup | None,
        backend: str,
        timeout: float,
        device: torch.device | None,
        buffers: int,
    ) -> None:
        self.transport, self.reason = _connect(group, backend, timeout, device)
        self.rank, self.world = self.transport.rank, self.transport.world
        self.device = self.transport.device
        self._buffers, self._in_flight = buffers, 0
        self._broken: EPError | None = None
        _log.info("rank %d of %d: %s: %s", self.rank, self.world, self.transport.name, self.reason)

    def ready(self, op: str) -> None:
        """Raise `EPMisuse` unless `op` may begin."""
        if self._broken is not None:
            raise EPMisuse(
                f"{op}: the group is out of use: {self._broken}; make another one"
            ) from self._broken
        if self._in_flight >= self._buffers:
            raise EPMisuse(
                f"{op}: expected at most {self._buffers} operations under way, this would be "
                f"{self._in_flight + 1}; wait() for one, or pass a larger num_buffers"
            )

    def gather(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """int64 words of all ranks, on the host, a matrix [P, n] for each part."""
        message = torch.cat([part.to(self.device) for part in parts])
        return self._guarded(lambda: self.transport.gather(message)).split(
            [len(part) for part in parts], 1
        )

    def start(
        self, buffer: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Callable[[], Tensor]:
        """`Transport.start`, which takes one of the buffers until its result is there."""
        self.ready("exchange")
        wait = self._guarded(lambda: self.transport.start(buffer, sent, received))
        self._in_flight += 1

        def arrived() -> Tensor:
            self._in_flight -= 1
            return self._guarded(wait)

        return arrived

    def agree(self, options: dict[str, Any], fault: Exception | None) -> None:
        """Raise on every rank, unless all have the same options and nothing to find fault with."""
        mine = {name: str(value) for name, value in options.items()} if fault is None else {}
        (words,) = self.gather([messages.text([messages.short(fault), mine])])
        if fault is not None:
            raise fault
        faults, found = zip(*messages.texts(words), strict=True)
        messages.raise_faults("ExpertParallel", faults)
        for name in options:
            messages.agree("ExpertParallel", name, [each[name] for each in found])

    def close(self) -> None:
        self.transport.close()
        self._broken = self._broken or EPMisuse("it was closed")

    def _guarded(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except EPError as error:
            self._broken = error
            raise


def _connect(
    group: Any, backend: str, timeout: float, device: torch.device | None
) -> tuple[Transport, str]:
    """The connection of this rank, and why it is that."""
    if isinstance(group, LocalGroup):
        why = f"{group.size} ranks are threads of one process"
        return LocalTransport(group, timeout, device or torch.device("cpu")), why
    group = group or dist.group.WORLD
    name, place, why = choose(group, device, backend)
    return GroupTransport(group, name, timeout, place), why
