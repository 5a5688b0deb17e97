# SPDX-License-Identifier: MIT
"""What bench_all_to_all does on a GPU, on the kernels' host models: all but the graphs."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_all_to_all, one_gpu
from benchmarks.report import Table

pytestmark = pytest.mark.usefixtures("simt_engine")
CASE = one_gpu.Case(2, 5, hidden=16, experts=6, top_k=2)


class NoGraph:
    """Holds nothing: what was called once is there."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"  # other ranks' threads make memory
        self.calls.append("begin")

    def capture_end(self) -> None:
        self.calls.append("end")

    def replay(self) -> None:
        self.calls.append("replay")


def test_all_ranks_are_in_one_graph_and_peers_do_the_same_work() -> None:
    made = one_gpu.Ranks(CASE, "cpu", NoGraph)
    made.replay()
    assert [graph.calls for graph in made.graphs.values()] == [["begin", "end", "replay"]] * 2
    rows = [rows.x[: int(rows.offsets[-1])] for _, rows, *_ in made.kept]
    assert max(map(len, rows)) == made.capacity == len(made.kept[0][1].x)
    assert torch.equal(torch.cat(rows), made.peers("dispatch")["torch"]())
    sums = torch.cat([y for _, _, y, *_ in made.kept]).float()
    theirs = made.peers("combine")["torch"]().squeeze(1).float()
    torch.testing.assert_close(sums, theirs, rtol=2e-2, atol=2e-2)
    copies = sum(len(set((row // 3).tolist())) for ids in made.ids for row in ids)
    assert made.bytes("dispatch") == 32 * (2 * 10 + copies + 2 * made.capacity)
    assert made.bytes("combine") == 32 * (2 * 10 + 2 * copies + 10)
    for op in one_gpu.OPS:
        assert made.peers(op)["copy"]().numel() == made.bytes(op) // 2  # read, and written
    made.kept[1][2].zero_()
    with pytest.raises(RuntimeError, match="a replay gave other bits than the call"):
        made.replay()


def test_the_table_says_whose_bandwidth_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = one_gpu.Ranks

    def small(case: one_gpu.Case, device: str) -> one_gpu.Ranks:
        assert device == "cuda" and (case.hidden, case.experts, case.top_k) == (7168, 384, 8)
        return whole(replace(CASE, ranks=min(case.ranks, 4)), "cpu", NoGraph)

    monkeypatch.setattr(one_gpu, "Ranks", small)
    tables: list[Table] = []

    def table(op: str, **more: Any) -> Table:
        tables.append(Table(op, "cpu", True, **more))
        return tables[-1]

    session: Any = SimpleNamespace(
        device="cuda", quick=True, options=SimpleNamespace(), bandwidth=1e9, table=table,
        select=lambda cases: cases,
    )  # fmt: skip
    bench_all_to_all.compare(session)
    names = [f"ranks8 tokens{tokens} experts384" for tokens in (128, 4096)]
    for made, op in zip(tables, one_gpu.OPS, strict=True):
        assert made.op == f"all_to_all ({op}, one GPU)"
        assert [row.case for row in made.rows] == names
        assert all(set(row.peers) == {"torch", "copy"} for row in made.rows)
    said = capsys.readouterr().out
    assert "bandwidth of the same device's memory, not of a link" in said and "NVLink" not in said
