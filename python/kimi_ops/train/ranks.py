# SPDX-License-Identifier: MIT
"""The processes of a run, and what they tell one another.

    world = replicas x expert ranks        rank = replica * expert ranks + place
    tokens, gradients of the rest          a share each of all ranks
    routed experts of a layer              shared out over the expert ranks of a replica
    copies of the same experts             on the ranks of one place, one in each replica

All that is not a routed expert is on every rank. MuonClip shares the work and the state of what
ranks hold in common (ZeRO-1), as Kimi K2 was trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2Config
from kimi_ops.parallel.errors import EPRankLost, EPTimeout, named
from kimi_ops.parallel.liveness import Roll

TIMEOUT = 120.0  # seconds until a process that does not come ends a run
Value = TypeVar("Value")


class PeerError(RuntimeError):
    """Another rank of the run has raised an error, and says so itself."""


class RankError(RuntimeError):
    """Ranks of the run have ended or do not come; the message names them."""


class Ranks:
    """One rank among those of a run; without a group the only one.

    Parameters
    ----------
    group : ProcessGroup, optional
        All ranks.
    expert_parallel : int
        Ranks that share the experts of a layer; it divides the number of ranks.
    timeout : float
        Seconds until a rank that does not come is an error.
    overlap : bool
        Compute micro-batches in twos, one's messages beside the other's products
        (`kimi_ops.models.kimi_k2.forward_two`); the same bits.

    Attributes
    ----------
    rank, world, expert_parallel, replicas : int
    overlap : bool
    everyone, same_experts : ProcessGroup or None
        All ranks; those that have the same experts. None where that is this rank alone.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        expert_parallel: int = 1,
        timeout: float = TIMEOUT,
        overlap: bool = False,
    ) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self.everyone, self._timeout = group, timeout
        self._roll = None if group is None else Roll(group, timeout, {})
        self.agree("--expert-parallel", expert_parallel)
        self.agree("--overlap", overlap)
        with self.together():
            check_layout(self.world, expert_parallel)
            check_overlap(overlap, expert_parallel)
        self.overlap = overlap
        self.expert_parallel, self.replicas = expert_parallel, self.world // expert_parallel
        replicas = [
            list(range(first, first + expert_parallel))
            for first in range(0, self.world, expert_parallel)
        ]
        self._experts = self._one_of(replicas)
        self.same_experts = self._one_of([list(place) for place in zip(*replicas, strict=True)])
        self._spread: list[ExpertRanks] = []

    def _one_of(self, groups: list[list[int]]) -> dist.ProcessGroup | None:
        """The group of these that has this rank, None where it is alone in it."""
        if len(groups[0]) == 1:
            return None
        if len(groups) == 1:
            return self.everyone
        limit = timedelta(seconds=self._timeout)
        return dist.new_subgroups_by_enumeration(groups, timeout=limit)[0]

    @property
    def lead(self) -> bool:
        """Whether this rank speaks, writes and decides."""
        return self.rank == 0

    @property
    def saves(self) -> bool:
        """Whether this rank is of the first replica, whose experts are those of a checkpoint."""
        return self.rank < self.expert_parallel

    def describe(self) -> str:
        """A line for the user."""
        experts = "each with all experts"
        if self._spread:
            experts = f"experts over {self.expert_parallel} by {self._spread[-1].backend}"
            experts += f", {self.replicas} times" * (self.replicas > 1)
            experts += ", two micro-batches side by side" * self.overlap
        return f"ranks  {self.world} processes, {experts}"

    def spread(
        self, config: KimiK2Config, max_tokens: int, device: torch.device
    ) -> ExpertRanks | None:
        """The way to the experts of a model; None where this rank has all. `close` ends it."""
        if self._experts is None:
            return None
        with self.together():
            check_experts(config.n_routed_experts, self.expert_parallel)
        made = ExpertRanks(
            self._experts,
            config,
            max_tokens=max_tokens,
            device=device,
            timeout=self._timeout,
            batches=2 if self.overlap else 1,
        )
        self._spread.append(made)
        return made

    def share(self, batch: Tensor, count: int) -> Tensor:
        """This rank's rows of each `count` rows of a batch; `count` is a multiple of the ranks."""
        if self.world == 1:
            return batch
        mine = count // self.world
        parts = batch.unflatten(0, (-1, count))
        return parts[:, self.rank * mine : (self.rank + 1) * mine].flatten(0, 1)

    def turns(self, count: int, device: torch.device) -> tuple[Tensor, int]:
        """Which of `count` rows are this rank's, and how many of them no other rank has: all ranks
        have equally many, the last ones the last row again."""
        size = -(-count // self.world)
        first = self.rank * size
        rows = torch.arange(first, first + size, device=device).clamp(max=count - 1)
        return rows, min(max(count - first, 0), size)

    def gather(self, numbers: Tensor) -> Tensor:
        """A vector of every rank, [ranks, n]: added up alike everywhere, whoever adds."""
        if self.everyone is None:
            return numbers[None]
        found = numbers.new_empty(self.world, len(numbers))
        dist.all_gather(list(found.unbind(0)), numbers, group=self.everyone)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.everyone is None:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.everyone)
        return bool(flags)

    def told(self, value: Value) -> list[Value]:
        """What each rank says."""
        if self.everyone is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.everyone)
        return values

    def agree(self, name: str, value: Any) -> None:
        """Raise a ValueError that names an option unless all ranks have one value for it."""
        with self.together():
            values = self.told(value)
            other = next((r for r, found in enumerate(values) if found != values[0]), None)
            if other is not None:
                raise ValueError(
                    f"kimi-ops: {name}: expected the same on every rank, rank 0 has {values[0]}, "
                    f"rank {other} {values[other]}; start all of them alike"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises in the body, where others do not wait for it, ends it for all: the
        rank raises its error, the others, and those with the same one, a `PeerError`."""
        fault: Exception | None = None
        try:
            yield
        except Exception as error:
            fault = error
        faults = self.told(None if fault is None else str(fault) or type(fault).__name__)
        wrong = [rank for rank, text in enumerate(faults) if text is not None]
        if not wrong:
            return
        if fault is not None and faults.index(faults[self.rank]) == self.rank:
            raise fault
        raise PeerError(f"kimi-ops: rank {wrong[0]}: {faults[wrong[0]]}") from fault

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A broken exchange in the body is a `RankError` that names who has ended or is silent."""
        try:
            yield
        except RuntimeError as error:
            if self._roll is None or not _of_an_exchange(error):
                raise
            raise RankError(
                f"{self._lost(error, self._roll)}; what was saved is whole: start all ranks again "
                "with --resume"
            ) from error

    def _lost(self, error: RuntimeError, roll: Roll) -> str:
        """Who is not there any more, by the numbers of all ranks."""
        cause = error.__cause__
        if isinstance(cause, RuntimeError) and "gloo" in str(cause):
            error = cause
        if not isinstance(error, EPRankLost | EPTimeout) or not error.ranks:
            return str(roll.error("kimi-ops", error))
        first = self.rank - self.rank % self.expert_parallel  # of this replica, which it counts in
        whom = named(first + rank for rank in error.ranks)
        if isinstance(error, EPTimeout):
            return f"kimi-ops: {whom} did not come within {self._timeout:g} s"
        return f"kimi-ops: the process of {whom} has ended"

    def close(self) -> None:
        """Give back the ways to the experts."""
        for spread in self._spread:
            spread.close()
        self._spread.clear()


def _of_an_exchange(error: RuntimeError) -> bool:
    """Whether other ranks are the cause; gloo has no type of its own."""
    return isinstance(error, dist.DistError | EPRankLost | EPTimeout) or "gloo" in str(error)


def check_layout(world: int, expert_parallel: int) -> None:
    """Raise unless so many ranks can be replicas of `expert_parallel` each."""
    if not 1 <= expert_parallel <= world or world % expert_parallel:
        raise ValueError(
            f"kimi-ops: --expert-parallel: expected a divisor of the {world} processes, got "
            f"{expert_parallel}; lower it, or start a multiple of it with torchrun"
        )


def check_experts(experts: int, expert_parallel: int) -> None:
    """Raise unless the experts of a layer can be shared out evenly."""
    if experts % expert_parallel:
        raise ValueError(
            f"kimi-ops: --expert-parallel: expected a divisor of the model's {experts} experts, "
            f"got {expert_parallel}; choose one"
        )


def check_overlap(overlap: bool, expert_parallel: int) -> None:
    """Raise where two micro-batches are wanted side by side and there are no messages to hide."""
    if overlap and expert_parallel == 1:
        raise ValueError(
            "kimi-ops: --overlap: expected experts over several processes, whose messages it "
            "hides, got --expert-parallel 1; leave it out, or raise --expert-parallel"
        )


def check_batch(sequences: int, accumulate: int, recompute: str, ranks: Ranks) -> None:
    """Raise unless every rank gets as many sequences of a micro-batch, and twos can be computed."""
    if ranks.overlap and recompute == "full":
        raise ValueError(
            "train: --recompute: expected none or selective beside --overlap, got full, of which a "
            "layer of one micro-batch would exchange anew beside the other's; change it (a resumed "
            "run may), or leave --overlap out"
        )
    if ranks.overlap and accumulate % 2:
        raise ValueError(
            f"train: --accumulate: expected an even number beside --overlap, which takes "
            f"micro-batches in twos, got {accumulate}; change it (a resumed run may, with "
            "--sequences), or leave --overlap out"
        )
    world = ranks.world
    if sequences % world:
        raise ValueError(
            f"train: --sequences: expected a multiple of the {world} processes, which share each "
            f"micro-batch, got {sequences}; change it (a resumed run may, with --accumulate), or "
            "start another number of processes"
        )


@contextmanager
def join_ranks(
    expert_parallel: int = 1,
    timeout: float = TIMEOUT,
    device: str = "auto",
    overlap: bool = False,
) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started together with this process; without it this one alone.

    The group is over with the body.

    Parameters
    ----------
    expert_parallel : int
        How many of them share the experts of a layer.
    timeout : float
        Seconds until a rank that does not come is an error.
    device : str
        ``cpu``, ``cuda`` or ``auto``; but for ``cpu`` each takes a GPU of its own where there are
        any.
    overlap : bool
        As of `Ranks`.

    Raises
    ------
    ValueError, PeerError
        Numbers that do not fit: the first rank says it, the others raise a `PeerError`.

    Examples
    --------
    >>> from kimi_ops.train import join_ranks
    >>> with join_ranks() as ranks:
    ...     ranks.rank, ranks.world
    (0, 1)
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(expert_parallel=expert_parallel, timeout=timeout, overlap=overlap)
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(
                f"kimi-ops: --device: expected a GPU for each of {here} processes, got {gpus}; "
                "start fewer, or choose --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        ranks = Ranks(dist.group.WORLD, expert_parallel, timeout, overlap)
        try:
            yield ranks
        finally:
            ranks.close()
    finally:
        dist.destroy_process_group()
