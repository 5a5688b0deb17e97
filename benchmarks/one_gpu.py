# SPDX-License-Identifier: MIT
"""Dispatch and combine between the ranks of a LocalWorld on one GPU, for bench_all_to_all.

One launch serves all ranks, in CUDA graphs, so that neither threads nor Python are in the times.
What is moved is this GPU's memory, to itself: bandwidth of the same device, which says nothing of a
link between GPUs. The roof is what torch.sum reads from memory in the same run; peers:

    torch     one index_select of all ranks' rows; index_select and bmm of all sums
    copy      as many bytes from one tensor to another

Up to 128 tokens a rank the time itself is what counts: that of decoding, nothing in it but kernels.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Function, Functions
from benchmarks.report import OURS
from benchmarks.session import Session
from kimi_ops import ExpertParallel, LocalWorld, topk_gate
from kimi_ops.parallel.layout import Placement

HIDDEN, TOP_K, EXPERTS = 7168, 8, 384
OPS = ("dispatch", "combine")
RANKS, TOKENS = (2, 4, 8), (1, 8, 32, 128, 512, 4096)
PATIENCE = 60.0  # seconds until a rank that has failed ends the others


@dataclass(frozen=True)
class Case:
    ranks: int
    tokens: int
    hidden: int = HIDDEN
    experts: int = EXPERTS
    top_k: int = TOP_K

    def __str__(self) -> str:
        return f"ranks{self.ranks} tokens{self.tokens} experts{self.experts}"


class Ranks:
    """The tensors of all ranks, and graphs that hold what they call."""

    def __init__(
        self, case: Case, device: str, graph: Callable[[], Any] = torch.cuda.CUDAGraph
    ) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(case.ranks)

        def random(columns: int) -> Tensor:
            shape = case.ranks, case.tokens, columns
            return torch.randn(shape, generator=generator, device=device)

        self.x, logits = random(case.hidden).bfloat16(), random(case.experts).cpu()
        gates = [topk_gate(part, case.top_k) for part in logits]
        self.ids = torch.stack([gate.indices for gate in gates])
        self.weights = torch.stack([gate.weights for gate in gates]).to(device)
        owner = Placement(case.experts, case.ranks).owners(self.ids.device)[self.ids.long()]
        to_rank = torch.nn.functional.one_hot(owner, case.ranks).sum(2)  # [P, T, P] pairs
        self.copies = int((to_rank > 0).sum())
        self.capacity = int(to_rank.sum((0, 1)).max())
        self.graphs = {op: graph() for op in OPS}
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._barrier = threading.Barrier(case.ranks, timeout=PATIENCE)
        self.kept = LocalWorld(case.ranks).run(self._work)

    def _work(self, group: Any) -> list[Any]:
        """What one rank keeps: its connection, captured rows and sums, and what they have to be."""
        case, rank = self.case, group.rank
        options = {"num_experts": case.experts, "hidden": case.hidden, "capacity": self.capacity}
        on_stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with on_stream, torch.no_grad():
            ep = ExpertParallel(
                group, backend="cuda", max_tokens_per_rank=case.tokens, **options
            )  # fmt: skip
            given = self.x[rank], self.ids[rank].to(self.device), self.weights[rank]
            first = ep.dispatch(*given)
            sums = ep.combine(first.x, first.handle)
            ep.check()
            with self._captured("dispatch", rank):
                rows = ep.dispatch(*given)
            with self._captured("combine", rank):
                y = ep.combine(rows.x, rows.handle)
            return [ep, rows, y, first.x, sums]

    @contextmanager
    def _captured(self, op: str, rank: int) -> Iterator[None]:
        """All ranks' calls in one graph; rank 0 begins and ends it."""
        graph = self.graphs[op]
        self._barrier.wait()
        if rank == 0:
            if self._stream is not None:
                torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
        self._barrier.wait()
        yield
        self._barrier.wait()
        if rank == 0:
            graph.capture_end()
        self._barrier.wait()

    def replay(self) -> None:
        """Both, and compare with what calls gave."""
        for op in OPS:
            self.graphs[op].replay()
        for ep, rows, y, *wanted in self.kept:
            ep.check()
            if not (torch.equal(rows.x, wanted[0]) and torch.equal(y, wanted[1])):
                raise RuntimeError(f"{self.case}: a replay gave other bits than the call")

    def bytes(self, op: str) -> int:
        """Of rows and sums that are read or written."""
        tokens, pairs = self.case.ranks * self.case.tokens, self.ids.numel()
        rows = self.capacity * self.case.ranks  # with those that are cleared
        count = 2 * tokens + self.copies + rows
        if op == "combine":
            count = pairs + 2 * self.copies + tokens
        return count * 2 * self.case.hidden

    def peers(self, op: str) -> dict[str, Function]:
        """The same work by torch, and as many bytes copied."""
        size = self.bytes(op) // 2
        source, target = (
            torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2)
        )
        order = self.ids.flatten().long().argsort(stable=True).to(self.device)
        token, x = order // self.case.top_k, self.x.flatten(0, 1)
        rows, place = x.index_select(0, token), order.argsort()
        weights = self.weights.flatten(0, 1).unsqueeze(1).bfloat16()
        there = torch.empty_like(rows)

        def sums() -> Tensor:
            picked = rows.index_select(0, place).view(-1, self.case.top_k, self.case.hidden)
            return torch.bmm(weights, picked)

        work: Function = sums
        if op == "dispatch":

            def work() -> Tensor:
                return torch.index_select(x, 0, token, out=there)

        return {"torch": work, "copy": lambda: target.copy_(source)}


def compare(session: Session, ranks: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    tables = {op: session.table(f"all_to_all ({op}, one GPU)", width=32) for op in OPS}
    print("ranks on one GPU: bandwidth of the same device's memory, not of a link between GPUs")
    for case in session.select([Case(p, t) for p in ranks for t in tokens]):
        made = Ranks(case, session.device)
        made.replay()
        for op, table in tables.items():
            named: Functions = {OURS: made.graphs[op].replay} | made.peers(op)
            table.compare(case, named, made.bytes(op), "GB/s", session.bandwidth)
        made.replay()
        for ep, *_ in made.kept:
            ep.close()
