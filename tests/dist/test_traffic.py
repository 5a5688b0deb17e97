# SPDX-License-Identifier: MIT
"""What travels: a token once to each of its ranks, or to each of its experts, and as often back."""

import threading

import pytest

from kimi_ops import ExpertParallel, LocalWorld
from kimi_ops.parallel.local import LocalTransport
from kimi_ops.reference import all_to_all as oracle
from tests.dist.all_to_all_cases import random_case


def records(case, rank):
    """Of a rank for each rank, from the ids alone."""
    owned = oracle.experts_of(case.experts, case.world)
    found = [0] * case.world
    for row in case.indices[rank].tolist():
        for target, mine in enumerate(owned):
            here = sum(expert in mine for expert in row)
            found[target] += here if case.layout == "expert_direct" else min(here, 1)
    return found


@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
def test_no_record_more_than_is_needed(layout, monkeypatch):
    told: dict[str, list[tuple[list[int], list[int]]]] = {}
    start = LocalTransport.start

    def counted(self, buffer, sent, received):
        told.setdefault(threading.current_thread().name, []).append((list(sent), list(received)))
        return start(self, buffer, sent, received)

    monkeypatch.setattr(LocalTransport, "start", counted)
    for seed in range(10):
        case = random_case(seed, 4, layout=layout, capacity=None, overflow="raise", align=1)
        told.clear()

        def work(group, case=case):
            ep = ExpertParallel(group, **case.options)
            weights = None if case.weights is None else case.weights[ep.rank]
            rows = ep.dispatch(case.x[ep.rank], case.indices[ep.rank], weights)
            ep.combine(rows.x, rows.handle)
            return threading.current_thread().name

        names = LocalWorld(case.world).run(work)
        expected = [records(case, rank) for rank in range(case.world)]
        for rank, name in enumerate(names):
            (there, came), (home, back) = told[name]
            ours, theirs = expected[rank], [row[rank] for row in expected]
            pairs = ((there, ours), (came, theirs), (home, theirs), (back, ours))
            for moved, counts in pairs:
                sizes = {size // count for size, count in zip(moved, counts, strict=True) if count}
                assert len(sizes) <= 1, seed  # of one record
                size = max(sizes, default=0)
                assert moved == [count * size for count in counts], seed
