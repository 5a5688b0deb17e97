# SPDX-License-Identifier: MIT
"""One rank's connection: its backend, its buffers, and whether it still works."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.parallel import messages
from kimi_ops.parallel.errors import EPError, EPMisuse, numbered
from kimi_ops.parallel.hops import Hops
from kimi_ops.parallel.liveness import Roll
from kimi_ops.parallel.local import LocalGroup, LocalTransport
from kimi_ops.parallel.peer_transport import PeerTransport, between_processes, in_one_process
from kimi_ops.parallel.peers import Peers
from kimi_ops.parallel.process_group import GroupTransport, choose
from kimi_ops.parallel.segment import Segment, share
from kimi_ops.parallel.shm import Pulls
from kimi_ops.parallel.transport import Motions, Transport
from kimi_ops.parallel.wire import Crossing, Form, Records

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
        members: Sequence[int],
        nodes: bool = False,
    ) -> None:
        self.members = members
        with self.numbered():
            found = _connect(group, backend, timeout, device, buffers, members, nodes)
        self.transport, self.reason = found
        self.rank, self.world = self.transport.rank, self.transport.world
        self.device = self.transport.device
        self._buffers, self._under_way = buffers, set[object]()
        self._broken: EPError | None = None
        self._hops: Hops | None = None
        _log.info("rank %d of %d: %s: %s", self.rank, self.world, self.transport.name, self.reason)

    def numbered(self) -> AbstractContextManager[None]:
        """Errors in the block call the ranks of the transport by the numbers of the members."""
        return numbered(self.members)

    def ready(self, op: str) -> None:
        """Raise `EPMisuse` unless `op` may begin."""
        self._works(op)
        if len(self._under_way) >= self._buffers:
            raise EPMisuse(
                f"{op}: expected at most {self._buffers} operations under way, this would be "
                f"{len(self._under_way) + 1}; wait() for one, pass a larger num_buffers, or after "
                "an error abandon() them"
            )

    def _works(self, op: str) -> None:
        if self._broken is not None:
            raise EPMisuse(
                f"{op}: the group is out of use: {self._broken}; make another one"
            ) from self._broken

    def gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """int64 words of all ranks, on the host, a matrix [P, n] for each of the sizes."""
        message = torch.cat([part.to(self.device) for part in parts])
        return self._guarded(lambda: self.transport.gather(message)).split(list(sizes), 1)

    def split(self, per_node: int) -> None:
        """Let tokens travel by nodes of so many ranks; all ranks call it."""
        transport: Any = self.transport
        node, rail = divmod(self.rank, per_node)
        with self.numbered():
            rails = transport.part(range(rail, self.world, per_node))
            neighbours = transport.part(range(node * per_node, (node + 1) * per_node))
        self._hops = Hops(rails, neighbours, self.start)

    @property
    def motions(self) -> Motions:
        """What brings rows from rank to rank."""
        if isinstance(self.transport, Segment):
            return Pulls(self.transport, self.start)
        if isinstance(self.transport, PeerTransport):
            return Peers(self.transport, self.start, self._buffers)
        if self._hops is not None:
            return Records(self._hops.way)
        transport: Transport = self.transport

        def exchange(*what: Any) -> Callable[[], Tensor]:
            return self.start(lambda: transport.start(*what))

        def crossing(route: Any, form: Form, back: Form) -> Crossing:
            return Crossing(exchange, route.sent, route.received, form, back)

        return Records(crossing)

    @property
    def lays_rows_out(self) -> bool:
        """Whether the motions plan for themselves what comes, without counts on the host."""
        return isinstance(self.transport, PeerTransport)

    def start(self, begin: Callable[[], Callable[[], Result]]) -> Callable[[], Result]:
        """An exchange, which takes one of the buffers until its result is there."""
        self.ready("exchange")
        wait = self._guarded(begin)
        self._under_way.add(this := object())

        def arrived() -> Result:
            if this not in self._under_way:
                raise EPMisuse(
                    "wait: expected an operation under way, got one that was abandoned; begin anew"
                )
            self._under_way.remove(this)
            self._works("wait")
            return self._guarded(wait)

        return arrived

    def abandon(self) -> None:
        """Give the buffers of what is under way back; nobody will wait for it."""
        self._under_way.clear()

    def agree(self, options: dict[str, Any], fault: Exception | None) -> None:
        """Raise on every rank, unless all have the same options and nothing to find fault with."""
        self.raise_faults("ExpertParallel", fault)
        found = self._texts({name: str(value) for name, value in options.items()})
        with self.numbered():
            for name in options:
                messages.agree("ExpertParallel", name, [each[name] for each in found])

    def raise_faults(self, op: str, fault: Exception | None) -> None:
        """Raise what this rank has to find fault with, or what others have; all ranks call it."""
        faults = self._texts(messages.short(fault))
        if fault is not None:
            raise fault
        with self.numbered():
            messages.raise_faults(op, faults)

    def _texts(self, value: Any) -> list[Any]:
        words = messages.text(value)
        return messages.texts(self.gather([words], [len(words)])[0])

    def check(self, motions: Motions) -> None:
        """Raise what kernels have found, which nobody may have looked at yet."""
        if isinstance(motions, Peers):
            self._works("check")
            self._guarded(lambda: motions.check("check"))

    def close(self) -> None:
        self.transport.close()
        self._broken = self._broken or EPMisuse("it was closed")

    def _guarded(self, call: Callable[[], Result]) -> Result:
        try:
            with self.numbered():
                return call()
        except EPError as error:
            self._broken = error
            raise


def _connect(
    group: Any, backend: str, timeout: float, device: torch.device | None, buffers: int,
    members: Sequence[int], nodes: bool,
) -> tuple[Transport | Segment | PeerTransport, str]:  # fmt: skip
    """The connection of this rank, and why it is that."""
    if isinstance(group, LocalGroup):
        why = f"{group.size} ranks are threads of one process"
        if backend == "cuda":
            return in_one_process(group, timeout, device, members), why
        return LocalTransport(group, timeout, device or torch.device("cpu"), members), why
    group = group or dist.group.WORLD
    name, place, why = choose(group, device, backend)
    wanted = "auto" if backend == "auto" and place.type == "cpu" else name
    roll = Roll(group, timeout, {"backend": wanted}, members)
    if wanted == "cuda":
        return between_processes(group, roll, timeout, place, members), why
    if wanted in ("auto", "shm") and not nodes:
        segment, found = share(roll, buffers, timeout)
        if segment is not None:
            return segment, found if wanted == "auto" else why
        if wanted == "shm":
            raise EPError(f"ExpertParallel: backend: expected ranks that share memory: {found}")
        why = f"{why}; no shared memory: {found}"
    return GroupTransport(roll, name, timeout, place), why
