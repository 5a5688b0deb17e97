# SPDX-License-Identifier: MIT
"""What can go wrong between ranks, by type."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_members: ContextVar[Sequence[int] | None] = ContextVar("members", default=None)


@contextmanager
def numbered(members: Sequence[int] | None) -> Iterator[None]:
    """In the block, rank n of a connection is called members[n]: some may have been masked."""
    token = _members.set(members)
    try:
        yield
    finally:
        _members.reset(token)


def number(rank: int) -> int:
    """What the caller calls a rank of a connection."""
    members = _members.get()
    return rank if members is None else members[rank]


class EPError(RuntimeError):
    """Any error between ranks, in expert parallelism or a step of MuonClip; `ranks` are the ranks
    that it is about, where known.

    An argument that this rank alone can judge is a TypeError or ValueError, as in every op.
    """

    def __init__(self, text: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(text)
        self.ranks = tuple(map(number, ranks))


class EPMismatch(EPError, ValueError):
    """Ranks were configured or called differently. All of them get this error."""


class EPMisuse(EPError):
    """A call out of turn: more in flight than there are buffers, a handle combined twice, a handle
    of another group, a group that is closed."""


class EPOverflow(EPError):
    """More rows arrive than the capacity holds. All ranks get this error, before a row moves; with
    the backend cuda their next calls do, and the group is out of use."""

    def __init__(self, text: str, ranks: Iterable[int], count: int) -> None:
        super().__init__(text, ranks)
        self.count = count


class EPPeerError(EPError):
    """Another rank refused its arguments; it raises its own error, the others this one."""


class EPTimeout(EPError, TimeoutError):
    """The deadline passed; `ranks` did not come. The group is out of use."""


class EPRankLost(EPError, ConnectionError):
    """The processes (threads of a LocalWorld) of `ranks` have ended. The group is out of use."""


def named(ranks: Iterable[int]) -> str:
    """ "rank 2" or "ranks 1, 3"."""
    numbers = [number(rank) for rank in ranks]
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
