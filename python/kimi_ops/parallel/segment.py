# SPDX-License-Identifier: MIT
"""Memory that all ranks of one host have mapped, and the messages in it.

    file    | flags, two sets | words [2, P, 2048] | closed [P] | labels [B, P] | window 0 | ...
    window  | field [P * rows, columns] | field | ...       rank r has written rows r * rows and on

The file is a memfd: it has no name, and is gone with the last process that has it open. A message
is a few matrices of every rank, of the same sizes everywhere, so that those of all ranks are one
tensor. Message n lies in window n % B; csrc/comm/flags.h says who waits for whom:

    begin    waits until all have read message n - B    then this rank writes its rows
    publish  releases its rows and its label
    wait     acquires those of all ranks                then this rank reads
    release  tells that it has read

B is one more than the messages under way, so that `begin` does not wait in practice: whoever has
published n - 1 has read n - B. The words of `gather` need no such telling: a rank writes its words
of n + 2 when it has those of n + 1 of all, who had read those of n then.
"""

import errno
import json
import mmap
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.parallel.errors import EPError, EPMismatch, EPRankLost, EPTimeout, named
from kimi_ops.parallel.liveness import Roll

Layout = Sequence[tuple[int, int, torch.dtype]]  # rows of a rank, columns, dtype: of each field
_RANKS = 64  # kMaxRanks of csrc/comm/flags.h
_WORDS = 2048  # of a rank in a gather: more than the counts of MAX_EXPERTS, or a text
_LABEL = 128  # bytes
_WINDOW = 1 << 42  # bytes of the file, of which there is memory for what was used
_FAULT = "!"  # begins the label of a rank that has written nothing
_LINE = 128
_SLICE = 0.05  # seconds between looks after signals, closed ranks and the deadline
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_NO_MEMORY = (errno.ENOSPC, errno.ENOMEM, errno.EFAULT, errno.EFBIG)


def share(roll: Roll, under_way: int, timeout: float) -> tuple["Segment | None", str]:
    """A segment of all ranks of a roll, or none: on every rank the same, and why."""
    if others := roll.elsewhere():
        return None, f"{named(others)} on another host or in another container than others"
    if roll.world > _RANKS:
        return None, f"{roll.world} ranks, of at most {_RANKS}"
    fault, found = "", Opened()
    try:
        if roll.rank == 0:
            found.file = _create(roll.world, under_way)
    except OSError as error:
        fault = f"rank 0: {error}"
    told = json.dumps([os.getpid(), found.file, _identity(found.file), fault])
    pid, number, identity, fault = json.loads(roll.exchange("segment", told)[0])
    segment = None
    try:
        if not fault:
            if roll.rank > 0:
                found.file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
            if _identity(found.file) != identity:
                raise FileNotFoundError("rank 0 has closed the memory")
            found.processes = roll.open_processes()
            segment = Segment(found, roll.rank, roll.world, under_way, timeout)
    except OSError as error:
        fault = f"{named([roll.rank])}: {error}"
    faults = [text for text in roll.exchange("opened", fault) if text]
    if segment is None or faults:
        found.close()
        return None, faults[0]
    return segment, f"all {roll.world} ranks are on this host, tensors are on cpu"


@dataclass
class Opened:
    """The descriptors of a segment: its file, and a pidfd of every other rank."""

    file: int = -1
    processes: list[int] = field(default_factory=list)

    def close(self) -> None:
        for descriptor in (self.file, *self.processes):
            if descriptor >= 0:
                os.close(descriptor)
        self.file, self.processes = -1, []


def _create(world: int, under_way: int) -> int:
    """The file descriptor of a segment, all zero."""
    file = os.memfd_create("kimi_ops", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, _WINDOW * (under_way + 2))
        os.posix_fallocate(file, 0, _head_bytes(world, under_way))
    except OSError:
        os.close(file)
        raise
    return file


def _identity(file: int) -> list[int]:
    """What tells a file from others, none where there is none."""
    if file < 0:
        return []
    found = os.fstat(file)
    return [found.st_dev, found.st_ino]


class Segment:
    """One rank's view of the memory of all ranks: the transport `shm`."""

    name, device = "shm", torch.device("cpu")

    def __init__(
        self, opened: Opened, rank: int, world: int, under_way: int, timeout: float
    ) -> None:
        self.rank, self.world, self._timeout = rank, world, timeout
        self._opened, self._buffers = opened, under_way + 1
        weakref.finalize(self, opened.close)  # one that nobody closed
        self._head = mmap.mmap(opened.file, _head_bytes(world, under_way))
        sizes = _sizes(world)
        flags = memoryview(self._head)
        size = _native._C.RankFlags.bytes(self.world)
        self._rows = _native._C.RankFlags(flags, rank, opened.processes, self._buffers)
        self._told = _native._C.RankFlags(flags[size:], rank, opened.processes, 2)
        self._words = torch.frombuffer(
            self._head, dtype=torch.int64, offset=sizes[0], count=2 * self.world * _WORDS
        ).view(2, self.world, _WORDS)
        self._closed_at = sizes[1]
        self._labels_at = sizes[2]
        self._windows = [Window(opened.file, _WINDOW * (n + 1)) for n in range(self._buffers)]
        self._gathers = self._messages = self._consumed = 0
        self._open: dict[int, Message] = {}
        self._read: set[int] = set()

    def gather(self, message: Tensor) -> Tensor:
        """The words of all ranks [P, n]."""
        self._gathers += 1
        part = self._words[self._gathers % 2, :, : len(message)]
        part[self.rank] = message
        self._told.publish(self._gathers)
        self._await(self._told.arrive, self._gathers, "the counts")
        return part.clone()

    def begin(self, op: str, layout: Layout) -> "Message":
        """The next message, for this rank to write its rows."""
        self._messages += 1
        number = self._messages
        if last := self._open.get(number - self._buffers):
            last.keep()
        self._await(self._rows.enter, number, op)
        message = Message(self, number, op, layout)
        self._open[number] = message
        return message

    def close(self) -> None:
        """Tell the others and give the memory back. Twice is once."""
        if self._opened.file < 0:
            return
        at = self._closed_at + 8 * self.rank
        self._head[at : at + 8] = b"closed  "
        self._opened.close()
        for message in self._open.values():
            message.fields = message.own = []
        self._windows.clear()
        del self._head, self._rows, self._told, self._words

    def _room(self, window: "Window", size: int) -> bool:
        """Whether there is memory for what all windows need, beyond what they have already."""
        if size <= window.reserved:
            return True
        needed = len(self._head) + size - window.reserved
        needed += sum(each.reserved for each in self._windows)
        return needed - os.fstat(self._opened.file).st_blocks * 512 <= available_memory()

    def _label(self, number: int, rank: int) -> slice:
        at = self._labels_at + _LABEL * (number % self._buffers * self.world + rank)
        return slice(at, at + _LABEL)

    def _consume(self, number: int) -> None:
        """Tell that messages were read: all up to a number, in whatever order they were."""
        self._read.add(number)
        del self._open[number]
        while self._consumed + 1 in self._read:
            self._consumed += 1
            self._read.remove(self._consumed)
        self._rows.consume(self._consumed)

    def _await(
        self, come: Callable[[int, float], tuple[list[int], list[int]]], number: int, op: str
    ) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            left = deadline - time.monotonic()
            silent, ended = come(number, max(0.0, min(left, _SLICE)))
            if ended:
                raise EPRankLost(f"{op}: the process of {named(ended)} has ended", ended)
            if not silent:
                return
            closed = [r for r in silent if self._head[self._closed_at + 8 * r]]
            others = [r for r in silent if self._is_elsewhere(r)]
            if closed or others:  # after it came here, or instead?
                silent = come(number, 0.0)[0]
            if others := [r for r in others if r in silent]:
                raise EPMismatch(
                    f"{op}: the ranks made different calls: {named(others)} did not come here but "
                    "went on to another",
                    others,
                )
            if closed := [r for r in closed if r in silent]:
                raise EPRankLost(f"{op}: {named(closed)} closed the connection", closed)
            if left <= 0 and silent:
                raise EPTimeout(
                    f"{op}: {named(silent)} did not come within {self._timeout:g} s", silent
                )

    def _is_elsewhere(self, rank: int) -> bool:
        """Whether a rank waited for here has published what this rank has not begun yet."""
        size = _native._C.RankFlags.bytes(self.world)
        at = size // self.world * rank
        rows, told = (
            int.from_bytes(self._head[start : start + 8], "little") >> 1
            for start in (at, size + at)
        )
        return rows > self._messages or told > self._gathers


class Window:
    """The memory of one message at a time, mapped and reserved as far as messages needed it.

    Attributes
    ----------
    layout : Layout
        Of the last message: `text` says it, `fields` and `own` are its matrices.
    fault : str
        Why there is no memory for it.
    """

    def __init__(self, file: int, start: int) -> None:
        self._file, self._start = file, start
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._map: mmap.mmap | None = None
        self.reserved = 0
        self.layout: Layout | None = None
        self.fault = self.text = ""
        self.fields: list[Tensor] = []
        self.own: list[Tensor] = []

    def place(self, segment: Segment, layout: Layout) -> None:
        """Make matrices of all ranks: one behind another, each as the ranks follow."""
        self.layout, self.fields, self.own = list(layout), [], []
        self.text = ", ".join(f"{r} x {c} {str(dtype)[6:]}" for r, c, dtype in layout)
        sizes = [rows * columns * dtype.itemsize for rows, columns, dtype in layout]
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-segment.world * size // _LINE) * _LINE)
        try:
            if not segment._room(self, ends[-1]):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            memory = self._mapped(ends[-1])
            if ends[-1] > self.reserved:
                for start, size in zip(ends, sizes, strict=False):
                    self._reserve(start + segment.rank * size, size)
                self.reserved = ends[-1]
        except OSError as error:
            if error.errno not in _NO_MEMORY:
                raise
            self.fault = f"no shared memory left for {ends[-1]} bytes: {error.strerror}"
            return
        for start, size, (rows, columns, dtype) in zip(ends, sizes, layout, strict=False):
            whole = memory[start : start + segment.world * size].view(dtype)
            self.fields.append(whole.view(segment.world * rows, columns))
            self.own.append(self.fields[-1][segment.rank * rows : (segment.rank + 1) * rows])

    def _mapped(self, size: int) -> Tensor:
        """uint8 [at least `size`]."""
        if size > len(self._memory) or self._map is None:
            length = 1 << max(21, (size - 1).bit_length())
            self._map = mmap.mmap(self._file, length, offset=self._start)
            with suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        return self._memory

    def _reserve(self, start: int, size: int) -> None:
        """Make pages of what this rank will write: writing cannot fail then."""
        assert self._map is not None
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        size = min(len(self._map), start + size) - first
        try:
            self._map.madvise(_POPULATE_WRITE, first, size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.posix_fallocate(self._file, self._start + first, size)  # an older kernel


class Message:
    """Matrices of all ranks: `fields` [P * rows, columns], of which this rank writes `own`."""

    def __init__(self, segment: Segment, number: int, op: str, layout: Layout) -> None:
        self._segment, self.number, self.op = segment, number, op
        self._here = False
        window = segment._windows[number % segment._buffers]
        if window.layout != layout:
            window.place(segment, layout)
        self.fields, self.own = window.fields, window.own
        self.fault = window.fault  # why nothing can be written
        self._label = f"{op} of {window.text}"

    def publish(self) -> None:
        """What this rank has written is for all to read."""
        segment = self._segment
        label = (f"{_FAULT}{self.fault}" if self.fault else self._label).encode()[:_LABEL]
        segment._head[segment._label(self.number, segment.rank)] = label.ljust(_LABEL)
        segment._rows.publish(self.number)

    def wait(self) -> None:
        """Until the rows of all ranks are there."""
        if self._here:
            return
        segment, head = self._segment, self._segment._head
        segment._await(segment._rows.arrive, self.number, self.op)
        labels = [head[segment._label(self.number, rank)] for rank in range(segment.world)]
        if labels.count(labels[0]) < len(labels) or self.fault:
            told = [label.decode(errors="replace").strip() for label in labels]
            kind: type[EPError] = EPMismatch
            ranks, why = list(range(len(told))), "the ranks made different calls"
            if failed := [rank for rank in ranks if told[rank].startswith(_FAULT)]:
                kind, ranks, why = EPError, failed, "no rank can go on"
            texts = "; ".join(
                f"{named([rank])}: {told[rank].removeprefix(_FAULT)}" for rank in ranks
            )
            raise kind(f"{self.op}: {why}: {texts}", ranks)
        self._here = True

    def keep(self) -> None:
        """Take what is to be read out of the window, which is needed again."""
        self.wait()
        self.fields = [rows.clone() for rows in self.fields]
        self.release()

    def release(self) -> None:
        """This rank has read what it needs. Twice is once."""
        if self.number in self._segment._open:
            self._segment._consume(self.number)


def _sizes(world: int) -> tuple[int, int, int]:
    """Where words, closed marks and labels begin."""
    words = 2 * _native._C.RankFlags.bytes(world)
    closed = words + 2 * world * _WORDS * 8
    return words, closed, closed + -(-8 * world // _LINE) * _LINE


def _head_bytes(world: int, under_way: int) -> int:
    return _sizes(world)[2] + (under_way + 1) * world * _LABEL


def available_memory() -> int:
    """Bytes of memory that this machine, and the container of this process, can still give."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # a container without a limit has no number
        folder = "/sys/fs/cgroup/memory."
        with open(f"{folder}max") as most, open(f"{folder}current") as now:
            free = min(free, int(most.read()) - int(now.read()))
    return free
