# SPDX-License-Identifier: MIT
"""A LocalWorld of the backend cuda on one GPU: one launch for all ranks, and a stream for each."""

import pytest
import torch

from kimi_ops import ExpertParallel, LocalWorld, _native
from kimi_ops.parallel import EPOverflow
from tests.dist.all_to_all_cases import triple
from tests.dist.test_peers import case_of, graded_case, run

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native._C.cuda_architectures()), reason="no GPU"
)
WORLDS = [(True, 8), (False, 8), (True, 2), (False, 4)]
SMALL = {"num_experts": 8, "hidden": 64, "max_tokens_per_rank": 16, "backend": "cuda"}


@pytest.mark.parametrize("streams", [False, True], ids=["one_launch", "streams"])
@pytest.mark.parametrize("seed", range(24))
def test_bits_of_the_oracle(seed: int, streams: bool) -> None:
    case = case_of(seed)
    received = case.received()
    outs = [triple(rows.x) for rows in received]

    def work(group):
        rank, want = group.rank, received[group.rank]
        given = [part[rank].cuda() for part in (case.x, case.indices)]
        weights = None if case.weights is None else case.weights[rank].cuda()
        with torch.no_grad(), ExpertParallel(group, backend="cuda", **case.options) as ep:
            rows = ep.dispatch(*given, weights)
            for found, expected in (
                (rows.x, want.x), (rows.offsets, want.offsets),
                (rows.tokens_per_expert, want.tokens_per_expert),
                (ep.combine(triple(rows.x), rows.handle), case.combined(outs, received)[rank]),
            ):  # fmt: skip
                assert torch.equal(found.cpu(), expected)

    LocalWorld(case.world, streams=streams).run(work)


@pytest.mark.parametrize("seed", range(8))
def test_gradients_are_those_of_the_reference(seed: int) -> None:
    case = graded_case(seed)
    found = run(case, "cuda", "cuda", streams=True), run(case, "reference")
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and torch.equal(a.cpu(), b)


@pytest.mark.parametrize(("streams", "world"), WORLDS)
def test_ten_thousand_calls_give_the_same_bits(streams: bool, world: int) -> None:
    """As many as find a fence that is missing, by what is compared on the GPU."""

    def work(group):
        x, ids = torch.randn(16, 64, device="cuda").bfloat16(), torch.arange(32).view(16, 2).cuda()
        options = SMALL | {"num_experts": 32, "capacity": 16 * 2 * world, "overflow": "drop"}
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        with torch.no_grad(), ExpertParallel(group, **options) as ep:
            first = None
            for _ in range(10_000 // (2 * world)):
                rows = ep.dispatch(x, ids)
                y = ep.combine(rows.x, rows.handle)
                first = first or (rows.x.clone(), y.clone())
                different += (rows.x != first[0]).sum() + (y != first[1]).sum()
            ep.check()
            assert int(different) == 0 and torch.equal(first[1], (2 * x.float()).bfloat16())

    LocalWorld(world, streams=streams).run(work)


def test_too_many_rows_are_found_later() -> None:
    def work(group):
        with torch.no_grad(), ExpertParallel(group, capacity=8, **SMALL) as ep:
            ids = torch.zeros(8, 1, dtype=torch.int32, device="cuda")
            x = torch.ones(8, 64, device="cuda").bfloat16()
            with pytest.raises(EPOverflow, match="rank 0 would have got up to 16"):
                ep.dispatch(x, ids)
                ep.check()

    LocalWorld(2, streams=True).run(work)
