# SPDX-License-Identifier: MIT
"""Two micro-batches side by side against one after the other: forward and backward over ranks.

The `mini` model, its experts spread over processes of this machine, each bound to its cores; fp32.
Ways take turns, each behind a barrier; a time is that of the slowest rank, the row shows the
median. Both ways compute the same bits. The peer is named by what it does:

    in turn   forward and backward of the first micro-batch, then of the second

Work: the tokens of all ranks (as calls/s); there is no roof but the peer. With as many ranks as
cores copies take the time of products, and what is hidden is waiting for one another. The case with
a rate stands for a network: what gloo has brought counts as arrived when a link of that rate into
the rank would have brought it, and until then the rank sleeps. With --device cuda each rank takes a
GPU: by NCCL where there are as many, by the kernels of the backend cuda in any case.

    python -m benchmarks.bench_two_batches [--ranks 2,4] [--link 1] [--trace FOLDER] [--help]
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

from benchmarks.measure import Time
from benchmarks.options import numbers, parse, parser
from benchmarks.processes import samples, told
from benchmarks.report import OURS, Row
from benchmarks.session import Session
from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2, KimiK2Config, backward_two, forward_two

PEER = "in turn"
RANKS, SEQUENCES, WINDOW = (2, 4), 4, 256
LINK = 1.0  # Gb/s
BUDGET, QUICK = 6.0, 2.0  # seconds a way


@dataclass(frozen=True)
class Case:
    ranks: int
    backend: str
    link: float = 0.0  # bits/s into a rank; 0: as fast as it comes
    sequences: int = SEQUENCES

    def __str__(self) -> str:
        link = f" {self.link / 1e9:g}Gb/s" if self.link else ""
        return f"ranks{self.ranks} {self.backend}{link} B{self.sequences} S{WINDOW}"


class Link:
    """A transport whose bytes arrive one behind the other at a rate, at the earliest."""

    def __init__(self, transport: Any, rate: float) -> None:
        self._start, self._seconds, self._free = transport.start, 8 / rate, 0.0
        transport.start = self.start

    def start(self, buffer: Tensor, sent: Any, received: Any) -> Callable[[], Tensor]:
        wait = self._start(buffer, sent, received)
        self._free = max(self._free, time.monotonic()) + sum(received) * self._seconds
        due = self._free

        def arrived() -> Tensor:
            found: Tensor = wait()
            time.sleep(max(0.0, due - time.monotonic()))
            return found

        return arrived


class Rank:
    """One rank's model and micro-batches."""

    def __init__(self, case: Case, rank: int, device: torch.device) -> None:
        config = dataclasses.replace(KimiK2Config.mini(), vocab_size=256)
        tokens = case.sequences * WINDOW
        self.spread = ExpertRanks(
            dist.group.WORLD, config, max_tokens=tokens, device=device, batches=2,
            backend=case.backend,
        )  # fmt: skip
        if case.link:
            Link(self.spread._parallel._connection.transport, case.link)
        self.model = KimiK2(config, device=device, expert_ranks=self.spread).train()
        generator = torch.Generator().manual_seed(rank)
        ids = torch.randint(0, 256, (2, case.sequences, WINDOW + 1), generator=generator)
        self.first, self.second = ids.to(device)

    def side_by_side(self) -> None:
        outputs = forward_two(self.model, self.first[:, :-1], self.second[:, :-1])
        backward_two(
            self.model,
            [
                loss(output.logits, batch)
                for output, batch in zip(outputs, (self.first, self.second), strict=True)
            ],
        )
        self._forget()

    def in_turn(self) -> None:
        for batch in (self.first, self.second):
            loss(self.model(batch[:, :-1]), batch).backward()
        self._forget()

    def _forget(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model.reset_statistics()


def loss(logits: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def _work(
    index: int, case: Case, budget: float, device: str, trace: Path | None
) -> list[list[list[float]]]:
    wait: Callable[[], None] = lambda: None  # noqa: E731
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", index % torch.cuda.device_count())
        torch.cuda.set_device(place)
        wait = torch.cuda.synchronize
    rank = Rank(case, index, place)
    times = samples([rank.side_by_side, rank.in_turn], budget, wait)
    traced = trace is not None and index == 0
    with profile() if traced else nullcontext() as profiler:
        rank.side_by_side()
        wait()
    if profiler is not None and trace is not None:
        profiler.export_chrome_trace(
            str(trace / f"{case}.json".replace(" ", "_").replace("/", "p"))
        )
    rank.spread.close()
    return times


def cases_of(ranks: int, device: str, link: float) -> list[Case]:
    if device == "cpu":
        return [Case(ranks, "shm"), Case(ranks, "gloo"), Case(ranks, "gloo", link)]
    names = ["cuda", "nccl"] if torch.cuda.device_count() >= ranks else ["cuda"]
    return [Case(ranks, name) for name in names]


def compare(session: Session) -> None:
    counts = getattr(session.options, "ranks", None) or RANKS
    link = 1e9 * getattr(session.options, "link", LINK)
    trace: Path | None = getattr(session.options, "trace", None)
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
    budget = QUICK if session.quick else BUDGET
    table = session.table("two batches (forward and backward)", width=34, memory=PEER)
    for count in counts[:1] if session.quick else counts:
        cases = session.select(cases_of(count, session.device, link))
        if not cases:
            continue
        for case, found in told(_work, cases, count, budget, session.device, trace):
            (ours, worked), (peer, worked_peer) = (
                [Time.of(taken) for taken in way] for way in found
            )
            tokens = 2 * case.ranks * case.sequences * WINDOW
            roof = tokens / peer.median
            table.add(Row(str(case), ours, tokens, "Mcall/s", roof, {PEER: peer}))
            print(
                f"    processor ms of the slowest rank: {OURS} {1e3 * worked.median:.0f}, "
                f"{PEER} {1e3 * worked_peer.median:.0f}",
                flush=True,
            )


def rate(text: str) -> float:
    found = float(text)
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError("expected a number above 0")
    return found


def options() -> argparse.ArgumentParser:
    made = parser("benchmarks.bench_two_batches", __doc__ or "")
    words = "ranks, each a process (default: 2,4)"
    made.add_argument("--ranks", type=numbers, metavar="P,..", help=words)
    words = f"of the network that is stood for (default: {LINK:g})"
    made.add_argument("--link", type=rate, metavar="GBIT/S", default=LINK, help=words)
    words = "write a trace of rank 0 for each case, for chrome://tracing (default: not written)"
    made.add_argument("--trace", type=Path, metavar="FOLDER", help=words)
    return made


if __name__ == "__main__":
    run = Session(parse(options(), None))
    compare(run)
    run.finish()
