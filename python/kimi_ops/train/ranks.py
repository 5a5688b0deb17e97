# SPDX-License-Identifier: MIT
"""The processes of a run, and what they tell one another.

    world = stages x replicas x expert ranks    PP x DP; DP = replicas x EP, as `kimi-ops plan` says
    rank = (stage * replicas + replica) * expert ranks + place

    layers                                 neighbours on the ranks of a stage
    tokens, gradients of the rest          a share each of the ranks of a stage
    routed experts of a layer              shared out over the expert ranks of a replica
    copies of the same experts             on the ranks of one place, one in each replica
    hidden values and their gradients      between ranks of one place in neighbouring stages

All that is not a routed expert is on every rank of its stage. MuonClip shares the work and the
state of what ranks hold in common (ZeRO-1), as Kimi K2 was trained.
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

from kimi_ops.choices import PipelineSchedule
from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2Config
from kimi_ops.parallel.errors import EPRankLost, EPTimeout, named
from kimi_ops.parallel.liveness import Roll
from kimi_ops.plan.work import Layout
from kimi_ops.train.layout import (
    check_experts,
    check_layout,
    check_overlap,
    check_schedule,
    check_stages,
)

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
    pipeline_parallel : int
        Stages that the layers are shared out to; it divides the number of ranks.
    schedule : str
        Of the micro-batches through the stages: a name in `kimi_ops.train.layout.SCHEDULES`; the
        same bits.

    Attributes
    ----------
    rank, world, stage : int
    layout : Layout
        ``ep`` expert ranks, ``pp`` stages, ``dp`` ranks of a stage.
    overlap : bool
    schedule : str
    everyone, same_stage, same_experts, stages : ProcessGroup or None
        All ranks; those of this stage; those that have the same experts; one of each stage, in the
        place of this. None where that is this rank alone.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        expert_parallel: int = 1,
        timeout: float = TIMEOUT,
        overlap: bool = False,
        pipeline_parallel: int = 1,
        schedule: PipelineSchedule = "1F1B",
    ) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self.everyone, self._timeout = group, timeout
        self._roll = None if group is None else Roll(group, timeout, {})
        self.agree("--expert-parallel", expert_parallel)
        self.agree("--pipeline-parallel", pipeline_parallel)
        self.agree("--schedule", schedule)
        self.agree("--overlap", overlap)
        with self.together():
            check_layout(self.world, expert_parallel, pipeline_parallel)
            check_schedule(schedule)
            check_overlap(overlap, expert_parallel, pipeline_parallel)
        self.overlap, self.schedule = overlap, schedule
        self.layout = Layout(expert_parallel, pipeline_parallel, self.world // pipeline_parallel)
        ranks = torch.arange(self.world, device="cpu").view(pipeline_parallel, -1, expert_parallel)
        self.stage = self.rank // self.layout.dp
        self.same_stage = self._one_of(ranks.flatten(1))
        self.stages = self._one_of(ranks.flatten(1).T)
        self._experts = self._one_of(ranks.flatten(0, 1))
        self.same_experts = self._one_of(ranks.transpose(1, 2).flatten(0, 1))
        self._spread: list[ExpertRanks] = []

    def _one_of(self, ranks: Tensor) -> dist.ProcessGroup | None:
        """The group of these, [groups, ranks], that has this rank, None where it is alone in it."""
        if ranks.shape[1] == 1:
            return None
        if len(ranks) == 1:
            return self.everyone
        limit = timedelta(seconds=self._timeout)
        return dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=limit)[0]

    @property
    def lead(self) -> bool:
        """Whether this rank speaks, writes and decides."""
        return self.rank == 0

    @property
    def saves(self) -> bool:
        """Whether this rank is of the first replica of its stage, whose experts are those of a
        checkpoint."""
        return self.rank % self.layout.dp < self.layout.ep

    def describe(self) -> str:
        """A line for the user."""
        experts = "each with all experts"
        if self._spread:
            experts = f"experts over {self.layout.ep} by {self._spread[-1].backend}"
            experts += f", {self.layout.replicas} times" * (self.layout.replicas > 1)
            experts += ", two micro-batches side by side" * self.overlap
        stages = f"{self.layout.pp} stages by {self.schedule}, " * (self.layout.pp > 1)
        return f"ranks  {self.world} processes, {stages}{experts}"

    def layers(self, config: KimiK2Config) -> range:
        """Of a model, those of this rank."""
        check_stages(config.num_hidden_layers, self.layout.pp)
        return self.layout.stages(config.num_hidden_layers)[self.stage]

    def spread(
        self, config: KimiK2Config, max_tokens: int, device: torch.device
    ) -> ExpertRanks | None:
        """The way to the experts of a model; None where this rank has all. `close` ends it."""
        if self._experts is None:
            return None
        with self.together():
            check_experts(config.n_routed_experts, self.layout.ep)
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
        """This rank's rows of each `count` rows of a batch; the ranks of a stage divide `count`."""
        if self.layout.dp == 1:
            return batch
        mine, turn = count // self.layout.dp, self.rank % self.layout.dp
        parts = batch.unflatten(0, (-1, count))
        return parts[:, turn * mine : (turn + 1) * mine].flatten(0, 1)

    def turns(self, count: int, device: torch.device) -> tuple[Tensor, int]:
        """Which of `count` rows are this rank's, and how many of them no other rank of its stage
        has: all have equally many, the last ones the last row again."""
        size = -(-count // self.layout.dp)
        first = self.rank % self.layout.dp * size
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
        first = self.rank - self.rank % self.layout.ep  # of this replica, which it counts in
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


@contextmanager
def join_ranks(
    expert_parallel: int = 1,
    timeout: float = TIMEOUT,
    device: str = "auto",
    overlap: bool = False,
    pipeline_parallel: int = 1,
    schedule: PipelineSchedule = "1F1B",
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
    overlap, pipeline_parallel, schedule
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
    layout = expert_parallel, timeout, overlap, pipeline_parallel, schedule
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(None, *layout)
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
        ranks = Ranks(dist.group.WORLD, *layout)
        try:
            yield ranks
        finally:
            ranks.close()
    finally:
        dist.destroy_process_group()
