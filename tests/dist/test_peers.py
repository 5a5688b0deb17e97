# SPDX-License-Identifier: MIT
"""The `cuda` backend over the threads of a LocalWorld, its kernels run on the host."""

import pytest
import torch
from torch import Tensor

from kimi_ops import ExpertParallel, Fp8Rows, LocalWorld, _native, formats
from kimi_ops.parallel.errors import EPMismatch, EPMisuse, EPOverflow, EPRankLost, EPTimeout
from kimi_ops.parallel.peer_memory import PeerMemory, slices
from tests.dist.all_to_all_cases import Case, check, random_case, triple, without

pytestmark = pytest.mark.usefixtures("simt_engine")
WORLDS = (1, 2, 3, 4)  # the host's device has room for 5 blocks that wait


def case_of(seed: int) -> Case:
    case = random_case(seed, world=WORLDS[seed % 4])
    if case.x[0].dtype == torch.float64:  # there are no kernels for it
        case.x = [x.float() for x in case.x]
        case.weights = None if case.weights is None else [w.float() for w in case.weights]
    return case


def graded_case(seed: int) -> Case:
    case = case_of(seed)
    if case.x[0].dtype == torch.float16 and case.wire == torch.bfloat16:
        case.wire = None  # whose gradients the other backends round twice
    return case


@pytest.mark.parametrize("seed", range(24))
def test_bits_of_the_oracle(seed: int) -> None:
    case = case_of(seed)
    LocalWorld(case.world).run(lambda group: check(case, group, group.rank, triple, "cuda"))


def run(
    case: Case, backend: str, device: str = "cpu", *, streams: bool = False
) -> list[list[Tensor]]:
    """y and the gradients of x and the weights, on every rank."""

    def work(group):
        rank = group.rank
        with ExpertParallel(group, backend=backend, **case.options) as ep:
            assert ep.backend == backend
            given = [case.x[rank], *([] if case.weights is None else [case.weights[rank]])]
            leaves = [part.to(device, copy=True).requires_grad_() for part in given]
            rows = ep.dispatch(leaves[0], case.indices[rank].to(device), *leaves[1:])
            y = ep.combine(triple(rows.x), rows.handle)
            outer = torch.randn(y.shape, generator=torch.Generator().manual_seed(rank))
            return [y.detach(), *torch.autograd.grad(y, leaves, outer.to(y))]

    return LocalWorld(case.world, streams=streams).run(work)


@pytest.mark.parametrize("seed", range(16))
def test_gradients_are_those_of_the_reference(seed: int) -> None:
    case = graded_case(seed)
    for ours, theirs in zip(run(case, "cuda"), run(case, "reference"), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_fp8_rows_travel_as_they_are() -> None:
    x = torch.randn(5, 200)
    data, scale = formats.quantize_rows(x)

    def work(group):
        options = {"num_experts": 2, "hidden": 200, "max_tokens_per_rank": 5}
        with ExpertParallel(group, backend="cuda", **options) as ep:
            ids = torch.full((5, 1), 1 - group.rank)
            rows = ep.dispatch(Fp8Rows(data, scale), ids)
            assert torch.equal(rows.x.data.view(torch.uint8), data.view(torch.uint8))
            assert torch.equal(rows.x.scale, scale)

    LocalWorld(2).run(work)


SMALL = {"num_experts": 2, "hidden": 8, "max_tokens_per_rank": 4, "backend": "cuda"}


def test_buffers_grow_and_serve_operations_under_way() -> None:
    def work(group):
        x = torch.arange(32.0).view(4, 8)
        with ExpertParallel(group, num_buffers=2, **SMALL) as ep:
            ids = torch.tensor([[0], [1], [1], [-1]])
            small = ep.dispatch(x[:1], ids[:1], async_op=True)
            large = ep.dispatch(x, ids, async_op=True)  # more tokens: a larger buffer
            first, second = small.wait(), large.wait()
            back = ep.combine(second.x, second.handle), ep.combine(first.x, first.handle)
            assert torch.equal(back[0], x * (ids >= 0)) and torch.equal(back[1], x[:1])

    LocalWorld(2).run(work)


@pytest.mark.parametrize("lost", [{1}, {0}, {3}, {0, 2}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_has_the_bits_of_the_oracle(seed: int, lost: set[int]) -> None:
    case = random_case(seed, 4)
    if case.x[0].dtype == torch.float64:
        case.x = [x.float() for x in case.x]
        case.weights = case.weights and [w.float() for w in case.weights]
    rest = without(case, lost)
    received = rest.received()
    outs = [triple(rows.x) for rows in received]
    combined = rest.combined(outs, received)
    left = [rank for rank in range(4) if rank not in lost]

    def work(group):
        rank, want = group.rank, received[group.rank]
        with ExpertParallel(group, backend="cuda", **case.options) as ep:
            owned = ep.experts
            if rank in lost:
                return
            x = case.x[rank].clone().requires_grad_()
            with pytest.raises(EPRankLost):
                ep.dispatch(x, case.indices[rank])
            ep.mask_rank(*lost)
            assert ep.active_ranks == tuple(left) and ep.experts == owned
            rows = ep.dispatch(x, case.indices[rank], case.weights and case.weights[rank])
            assert torch.equal(rows.x, want.x) and torch.equal(rows.offsets, want.offsets)
            assert rows.handle.dropped == want.dropped
            for n, source in enumerate(left):
                kept = rest.indices[source]
                count = int(((kept >= 0) & (kept < case.experts)).sum())
                assert int(rows.handle.loads[n].sum()) == count
            y = ep.combine(triple(rows.x), rows.handle)
            assert torch.equal(y, combined[rank])
            y.sum().backward()  # with the lost ranks it would not end
            assert x.grad is not None
            again = ep.dispatch(case.x[rank], handle=rows.handle)
            assert torch.equal(again.x, want.x)

    LocalWorld(4).run(work)


def test_a_masked_group_names_ranks_by_their_own_numbers() -> None:
    def work(group):
        with ExpertParallel(group, **SMALL | {"num_experts": 3}) as ep:
            if group.rank == 0:
                return
            ids = torch.zeros(1, 1, dtype=torch.int32)
            with pytest.raises(EPRankLost):
                ep.dispatch(torch.zeros(1, 8), ids)
            ep.mask_rank(0)
            ep.dispatch(torch.zeros(1, 8), ids)
            ep._motions._memory.state[2] = 4  # rank 2 is silent
            with pytest.raises(EPTimeout, match="rank 2 did not") as caught:
                ep.dispatch(torch.zeros(1, 8), ids)
            assert caught.value.ranks == (2,)

    LocalWorld(3).run(work)


@pytest.mark.parametrize("overflow", ["drop", "raise"])
def test_with_a_fixed_capacity_the_host_asks_nobody(
    overflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of_rank_0 = 4 if overflow == "drop" else 0

    def work(group):
        x = torch.arange(32.0).view(4, 8)
        with ExpertParallel(group, capacity=3, overflow=overflow, **SMALL) as ep:
            monkeypatch.setattr(ep._connection, "gather", None)
            count = rows_of_rank_0 if group.rank == 0 else 3
            rows = ep.dispatch(x[:count], torch.zeros(count, 1, dtype=torch.int32))
            lost = rows_of_rank_0 if group.rank == 0 else 0
            assert rows.x.shape == (3, 8) and rows.handle.dropped == lost
            assert rows.handle.loads.tolist() == [[rows_of_rank_0, 0], [3, 0]]
            ep.check()
            return ep.combine(rows.x, rows.handle).sum(1).ne(0).tolist()

    kept = [[True, True, True, False], [False] * 3] if rows_of_rank_0 else [[], [True] * 3]
    assert LocalWorld(2).run(work) == kept


def test_too_many_rows_are_an_error_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group):
        with ExpertParallel(group, capacity=3, **SMALL) as ep:
            ids = torch.full((3, 1), 1, dtype=torch.int32)
            rows = ep.dispatch(torch.ones(1, 8), ids[:1])
            told = r"capacity: expected room for all rows, rank 1 would have got up to 6; raise it"
            with pytest.raises(EPOverflow, match=told) as caught:
                ep.dispatch(torch.ones(3, 8), ids)
            assert caught.value.ranks == (1,) and caught.value.count == 6
            with pytest.raises(EPMisuse, match="out of use"):
                ep.combine(rows.x, rows.handle)
            with pytest.raises(EPMisuse, match="check: the group is out of use"):
                ep.check()

    LocalWorld(2).run(work)


def test_what_only_a_check_sees() -> None:
    """A replay of a graph tells the host nothing."""

    def work(group):
        with ExpertParallel(group, capacity=3, **SMALL) as ep:
            ep.check()  # nothing has run
            ep.dispatch(torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int32))
            ep.check()
            ep._motions._memory.state[4:] = torch.tensor([2, 7 << 32])
            with pytest.raises(EPOverflow, match="check: capacity: .*rank 1 .* up to 7"):
                ep.check()

    LocalWorld(2).run(work)


def test_what_a_graph_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group):
        x, ids = torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int32)
        with (
            ExpertParallel(group, **SMALL) as asks,
            ExpertParallel(group, capacity=2, overflow="grow", **SMALL) as grows,
            ExpertParallel(group, capacity=4, **SMALL) as fixed,
        ):
            with monkeypatch.context() as patch:
                patch.setattr("kimi_ops.parallel.transport.capturing", lambda: True)
                for ep, told in ((asks, "'raise' with capacity=None"), (grows, "got 'grow' with")):
                    with pytest.raises(ValueError, match=f"dispatch: overflow: .*{told}"):
                        ep.dispatch(x, ids)
                with pytest.raises(ValueError, match="before a graph is captured, got 0 bytes"):
                    fixed.dispatch(x, ids)
            rows = fixed.dispatch(x, ids)
            with monkeypatch.context() as patch:
                patch.setattr("kimi_ops.parallel.transport.capturing", lambda: True)
                fixed.combine(rows.x, rows.handle)
                fixed.dispatch(x, ids)

    LocalWorld(1).run(work)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    def work(group):
        with ExpertParallel(group, **SMALL) as ep:
            ids = torch.zeros(4, 1, dtype=torch.int32)
            with pytest.raises(TypeError, match="dispatch: x: expected a dtype of at most 32 bits"):
                ep.dispatch(torch.zeros(4, 8, dtype=torch.float64), ids)
            with pytest.raises(TypeError, match="K = 33"):
                ep.dispatch(torch.zeros(4, 8), torch.full((4, 33), -1))

    LocalWorld(2).run(work)


def test_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "engine", _native._C)
    with pytest.raises(ValueError, match="device: expected a GPU for cuda, got cpu"):
        LocalWorld(1).run(lambda group: ExpertParallel(group, device="cpu", **SMALL))


@pytest.mark.parametrize(("word", "error"), [(2, EPTimeout), (3, EPMismatch)])
def test_what_the_kernels_find_is_an_error(
    word: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves are asked in tests/simt: here no rank can be late by itself."""

    def broken(world: int, size: int, device: torch.device, members) -> list[PeerMemory]:
        memories = slices(world, size, device, members)
        for memory in memories:
            memory.state[word] = 2
        return memories

    monkeypatch.setattr("kimi_ops.parallel.peer_transport.slices", broken)

    def work(group):
        with ExpertParallel(group, **SMALL) as ep:
            with pytest.raises(error, match="rank 1") as raised:
                ep.dispatch(torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int32))
            return raised.value.ranks

    assert LocalWorld(2).run(work) == [(1,), (1,)]
