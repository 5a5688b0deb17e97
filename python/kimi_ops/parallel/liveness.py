# SPDX-License-Identifier: MIT
"""Which ranks are there: through the store of their group, which outlives a broken connection, and
through /proc for the processes of this host."""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from kimi_ops.parallel.errors import EPError, EPMismatch, EPRankLost, EPTimeout, named, number
from kimi_ops.parallel.messages import agree

_ENDED = "ZXx"  # states of a process in /proc that runs no more: zombie, dead
_NOTICE = 1.0  # seconds until the end of a process whose connection broke shows in /proc
Process = list[Any]  # its host, its number and when it began


@dataclass(frozen=True)
class Part:
    """Some members of a roll, for a communicator of their own; what fails there concerns all."""

    rank: int
    world: int
    store: Any
    error: Callable[[str, Exception], EPError]


class Roll:
    """The members of a group, by default all ranks, each with its process.

    All ranks are asked to come when it is made: `EPTimeout` names those that do not, `EPMismatch`
    says that their `facts` differ. With `facts` None nobody is asked, and no process is known
    until `know` is told of them.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout: float,
        facts: dict[str, Any] | None,
        members: Sequence[int] | None = None,
    ) -> None:
        members = range(group.size()) if members is None else members
        self.rank, self.world = members.index(group.rank()), len(members)
        self._timeout = timeout
        # a connection of its own: a store that hangs must not take the group's with it
        store = group.get_group_store().clone()  # type: ignore[attr-defined]
        whose = "kimi_ops/" + "-".join(map(str, members))
        count = store.add(f"{whose}/{self.rank}", 1)
        self.store = dist.PrefixStore(f"{whose}/{count}", store)
        self._processes: list[Process] = []
        if facts is not None:
            mine = {"process": process(), "facts": facts}
            found = [json.loads(answer) for answer in self.exchange("here", json.dumps(mine))]
            for name in facts:
                agree("ExpertParallel", name, [entry["facts"][name] for entry in found])
            self.know([entry["process"] for entry in found])

    def know(self, processes: list[Process]) -> None:
        """The `process` of every rank."""
        self._processes = processes

    def part(self, members: Sequence[int], error: Callable[[str, Exception], EPError]) -> Part:
        store = dist.PrefixStore("part " + "-".join(map(str, members)), self.store)
        return Part(members.index(self.rank), len(members), store, error)

    def exchange(self, word: str, answer: str) -> list[str]:
        """The answers of all ranks; `word` is used once."""
        answers = self._call(word, answer)(self._timeout)
        if silent := self._missing(answers):
            raise EPTimeout(
                f"ExpertParallel: {named(silent)} did not come within {self._timeout:g} s; make it "
                "on every rank of the group",
                silent,
            )
        return [answers[rank] for rank in range(self.world)]

    def elsewhere(self) -> list[int]:
        """The ranks on another host than this one, or in another container of it."""
        mine = self._processes[self.rank][:-2]
        return [rank for rank, entry in enumerate(self._processes) if entry[:-2] != mine]

    def open_processes(self) -> list[int]:
        """A pidfd of every rank, -1 for this one's; OSError where one has ended or hides."""
        found: list[int] = []
        try:
            for rank, (*_, pid, start) in enumerate(self._processes):
                found.append(-1 if rank == self.rank else os.pidfd_open(pid))
                if _start_of(pid) != start:
                    raise ProcessLookupError(f"the process of {named([rank])} has ended")
        except OSError:
            for descriptor in found:
                if descriptor >= 0:
                    os.close(descriptor)
            raise
        return found

    def error(self, op: str, error: Exception) -> EPError:
        """What the failure of an exchange means: who is not there any more.

        A rank that gives up closes its connections, which others see: where one was late, all are.
        """
        text = str(error).split(". This")[0]
        seen = "late" if "imed out" in text or "imeout" in text else "failed"
        if "onnection" in text or "ipe" in text:
            seen = "broken"
        grace = min(2.0, max(1.0, 0.1 * self._timeout))
        calling = self._call("failed", f"{seen} {op}")  # at once: the others wait for it
        if lost := self._ended(_NOTICE if seen == "broken" else 0.0):
            # of several the others have perhaps learnt of the first one's end, told so and gone
            answers = calling(0.5 if len(lost) > 1 else 0.0)
            lost = [rank for rank in lost if rank not in answers] or lost
            return EPRankLost(f"{op}: the process of {named(lost)} has ended ({text})", lost)
        answers = calling(grace)
        silent = self._missing(answers)
        whom = named(silent) if silent else "no rank is silent; the exchange"
        came = {rank: answer.partition(" ")[2] for rank, answer in answers.items()}
        if not silent and len(set(came.values())) > 1:
            calls = ", ".join(
                f"rank {number(rank)} at {what}" for rank, what in sorted(came.items())
            )
            return EPMismatch(f"{op}: the ranks made different calls: {calls} ({text})", came)
        if any(answer.startswith("late") for answer in answers.values()):
            told = f"{op}: {whom} did not come within {self._timeout:g} s ({text})"
            return EPTimeout(told, silent)
        if seen == "broken":
            return EPRankLost(f"{op}: the connection to {whom} broke ({text})", silent)
        return EPError(f"{op}: the exchange failed: {text}")

    def _ended(self, patience: float) -> list[int]:
        """The ranks whose processes on this host have ended, once there are any."""
        here, deadline = _host(), time.monotonic() + patience
        while True:
            lost = [
                rank
                for rank, (*host, pid, start) in enumerate(self._processes)
                if tuple(host) == here and _start_of(pid) != start
            ]
            if lost or not self._processes or time.monotonic() >= deadline:
                return lost
            time.sleep(0.01)

    def _missing(self, answers: dict[int, str]) -> list[int]:
        return [rank for rank in range(self.world) if rank not in answers]

    def _call(self, word: str, answer: str) -> Callable[[float], dict[int, str]]:
        """Say that this rank is here; the result gives what all answer that say so in some seconds.

        The store of a rank that hangs hangs with it: it is asked by a thread, which then stays
        behind. It never does otherwise: one that comes back to Python at its exit aborts it.
        """
        answers, over = {self.rank: answer}, threading.Event()

        def ask() -> None:
            with suppress(RuntimeError):  # the store went down with a rank
                self.store.set(f"{word}/{self.rank}", answer)
                while len(answers) < self.world and not over.wait(0.005):
                    for rank in self._missing(answers):
                        if self.store.check([f"{word}/{rank}"]):
                            answers[rank] = self.store.get(f"{word}/{rank}").decode()

        thread = threading.Thread(target=ask, name="kimi_ops store", daemon=True)
        thread.start()

        def answered(seconds: float) -> dict[int, str]:
            try:
                thread.join(seconds)
            finally:
                over.set()
            thread.join(1.0)
            return dict(answers)

        return answered


def process() -> Process:
    """This process, so that others on its host can see when it has ended."""
    return [*_host(), os.getpid(), _start_of(os.getpid())]


def _host() -> tuple[str, str]:
    """This machine since it was started, and this container of it."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip(), os.readlink("/proc/self/ns/pid")


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks; None once it has ended. A number alone may be used again."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in _ENDED else fields[18]
