# SPDX-License-Identifier: MIT
"""ExpertParallel over the threads of a LocalWorld: the oracle's bits, gradients, errors."""

import logging
import threading
import time

import pytest
import torch

import kimi_ops
from kimi_ops import ExpertParallel, Fp8Rows, LocalWorld, fused_experts, topk_gate
from kimi_ops.parallel import (
    EPError,
    EPMismatch,
    EPMisuse,
    EPOverflow,
    EPPeerError,
    EPRankLost,
    EPTimeout,
    router,
)
from kimi_ops.parallel.layout import Placement
from kimi_ops.reference import all_to_all as oracle
from tests.dist.all_to_all_cases import check, random_case, triple

SMALL = {"num_experts": 4, "hidden": 2, "max_tokens_per_rank": 8}


def ids(*rows):
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("seed", range(150))
def test_every_rank_has_the_bits_of_the_oracle(seed):
    case = random_case(seed)
    LocalWorld(case.world).run(lambda group: check(case, group, group.rank, triple))


def test_experts_are_those_of_the_oracle():
    for experts in range(1, 20):
        for world in range(1, experts + 1):
            placement = Placement(experts, world)
            assert placement.ranges == oracle.experts_of(experts, world)
            owners = placement.owners(torch.device("cpu")).tolist()
            assert owners[:-1] == [r for r in range(world) for _ in placement.ranges[r]]
            assert owners[-1] == world


@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_gradients_are_those_of_the_dense_layer(world, layout):
    """y[t] = sum_k w[t, k] (x[t] A[e])^2 in fp64, with tokens only on some ranks."""
    generator = torch.Generator().manual_seed(world)
    experts, hidden, counts = 7, 3, [0, 4, 1, 0, 6][:world] if world > 1 else [5]

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a = random(experts, hidden, hidden)
    xs = [random(n, hidden) for n in counts]
    ws = [random(n, 3) for n in counts]
    chosen = [torch.randint(-1, experts + 1, (n, 3), generator=generator) for n in counts]
    outer = [random(n, hidden) for n in counts]

    matrices = a.clone().requires_grad_()
    tokens = torch.cat(xs).requires_grad_()
    weights = torch.cat(ws).requires_grad_()
    flat = torch.cat(chosen)
    kept = (flat >= 0) & (flat < experts)
    each = torch.einsum("th,tkhg->tkg", tokens, matrices[flat.where(kept, 0)]).square()
    dense = (each * (weights * kept)[..., None]).sum(1)
    (dense * torch.cat(outer)).sum().backward()

    def work(group):
        ep = ExpertParallel(
            group, num_experts=experts, hidden=hidden, max_tokens_per_rank=8, layout=layout,
            expert_alignment=2,
        )  # fmt: skip
        x, w = xs[ep.rank].clone().requires_grad_(), ws[ep.rank].clone().requires_grad_()
        mine = a[ep.experts.start : ep.experts.stop].clone().requires_grad_()
        rows = ep.dispatch(x, chosen[ep.rank], w)
        parts = rows.x.tensor_split(rows.offsets.tolist()[:-1])
        out = torch.cat([part @ matrix for part, matrix in zip(parts, mine, strict=True)]).square()
        y = ep.combine(out, rows.handle)
        (y * outer[ep.rank]).sum().backward()
        return y.detach(), x.grad, w.grad, mine.grad

    found = zip(*LocalWorld(world).run(work), strict=True)
    for ours, exact in zip(found, (dense, tokens.grad, weights.grad, matrices.grad), strict=True):
        torch.testing.assert_close(torch.cat(ours), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_gradient_is_the_other_operation(layout, wire):
    """dispatch's is combine without weights, combine's in out is dispatch, but for FP8: the same
    bits."""
    for seed, dtype in ((3, torch.float32), (4, torch.bfloat16), (8, torch.float32)):
        case = random_case(
            seed, 3, layout=layout, capacity=None, overflow="raise", weights=None, wire=wire,
            align=4,
        )  # fmt: skip
        case.x = [x.to(dtype) for x in case.x]
        generator = torch.Generator().manual_seed(seed)
        received = case.received()
        grads = [torch.randn(r.x.shape, generator=generator).to(dtype) for r in received]
        dx = case.combined(grads, received)
        back = None if wire == torch.float8_e4m3fn else wire
        dout = oracle.dispatch(
            case.x, case.indices, case.experts, expert_alignment=4, wire_dtype=back
        )

        def work(group, case=case, grads=grads):
            ep = ExpertParallel(group, **case.options)
            x = case.x[ep.rank].clone().requires_grad_()
            rows = ep.dispatch(x, case.indices[ep.rank])
            rows.x.backward(grads[ep.rank])
            again = ep.dispatch(case.x[ep.rank], handle=rows.handle)
            out = torch.zeros_like(again.x, requires_grad=True)
            ep.combine(out, again.handle).backward(case.x[ep.rank])
            return x.grad, out.grad

        for rank, (of_x, of_out) in enumerate(LocalWorld(3).run(work)):
            assert torch.equal(of_out, dout[rank].x)
            if wire != torch.float32 or dtype == wire:
                assert torch.equal(of_x, dx[rank])
            else:  # the gradient of a record is rounded to the dtype of x before it travels
                torch.testing.assert_close(of_x, dx[rank], rtol=2**-6, atol=2**-6)


def test_ranks_whose_experts_do_nothing_take_part_in_the_backward():
    def work(group):
        ep = ExpertParallel(group, timeout=5.0, **SMALL)
        x = torch.ones(1, 2, requires_grad=True)
        rows = ep.dispatch(x, ids([0]))
        out = rows.x * 2 if len(rows.x) else torch.zeros(0, 2)
        ep.combine(out, rows.handle).sum().backward()
        return x.grad.tolist()

    assert LocalWorld(2).run(work) == [[[2.0, 2.0]]] * 2


def test_dropped_pairs_have_no_gradient():
    def work(group):
        ep = ExpertParallel(group, capacity=2, overflow="drop", **SMALL)
        x, w = torch.ones(2, 2, requires_grad=True), torch.ones(2, 1, requires_grad=True)
        rows = ep.dispatch(x, ids([0], [0]), w)
        y = ep.combine(rows.x * 3, rows.handle)
        y.sum().backward()
        return rows.handle.dropped, y.tolist(), x.grad.tolist(), w.grad.flatten().tolist()

    first, second = LocalWorld(2).run(work)
    assert first == (2, [[3.0, 3.0]] * 2, [[3.0, 3.0]] * 2, [6.0, 6.0])
    assert second == (0, [[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2, [0.0, 0.0])


def layer(world, layout, wire=None, tokens=24, hidden=32, experts=8):
    """The experts of one layer over `world` ranks, forward and backward; all results by token."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x, gate = random(tokens, hidden), topk_gate(random(tokens, experts), 3)
    w_gate_up, w_down = random(experts, 2 * 16, hidden) / 6, random(experts, hidden, 16) / 4
    outer = random(tokens, hidden)

    def work(group):
        ep = ExpertParallel(
            group, num_experts=experts, hidden=hidden, max_tokens_per_rank=tokens, layout=layout,
            wire_dtype=wire,
        )  # fmt: skip
        mine = slice(ep.rank * tokens // ep.world, (ep.rank + 1) * tokens // ep.world)
        owned = slice(ep.experts.start, ep.experts.stop)
        leaves = [x[mine], gate.weights[mine], w_gate_up[owned], w_down[owned]]
        token, weight, up, down = (leaf.clone().requires_grad_() for leaf in leaves)
        rows = ep.dispatch(token, gate.indices[mine], weight)
        local = torch.repeat_interleave(rows.tokens_per_expert)[:, None].int()
        # every row has one expert, and its weight is applied on the way home
        out = fused_experts(rows.x, up, down, torch.ones(len(local), 1), local)
        y = ep.combine(out, rows.handle)
        y.backward(outer[mine])
        return y.detach(), token.grad, weight.grad, up.grad, down.grad

    found = LocalWorld(world).run(work)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, gate.weights, w_gate_up, w_down)]
    y = fused_experts(leaves[0], *leaves[2:], leaves[1], gate.indices)
    y.backward(outer)
    whole = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return whole, [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
def test_a_layer_over_ranks_is_the_layer(world, layout):
    for ours, single in zip(*layer(world, layout), strict=True):
        torch.testing.assert_close(ours, single, rtol=1e-4, atol=1e-5)


def test_expert_direct_does_not_depend_on_the_number_of_ranks():
    alone = layer(1, "expert_direct")[0]
    for world in (2, 3, 8):
        y, dx, dw = layer(world, "expert_direct")[0][:3]
        assert torch.equal(y, alone[0]) and torch.equal(dx, alone[1]) and torch.equal(dw, alone[2])


def test_fp8_rows_travel_as_they_are():
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(count, 130, generator=generator) for count in (3, 0, 2)]
    chosen = [torch.randint(0, 5, (len(part), 2), generator=generator) for part in x]
    weights = [torch.rand(len(part), 2, generator=generator) for part in x]
    rows = oracle.dispatch(x, chosen, 5, wire_dtype=torch.float8_e4m3fn)
    outs = [(r.x * 2).bfloat16() for r in rows]
    expected = oracle.combine(outs, rows, chosen, weights)

    def work(group):
        ep = ExpertParallel(group, num_experts=5, hidden=130, max_tokens_per_rank=8)
        w = weights[ep.rank].clone().requires_grad_()
        given = ep.dispatch(Fp8Rows.quantize(x[ep.rank]), chosen[ep.rank], w)
        assert isinstance(given.x, Fp8Rows) and torch.equal(
            given.x.dequantize(torch.float32), rows[ep.rank].x
        )
        y = ep.combine(outs[ep.rank], given.handle)
        y.float().sum().backward()
        return y.detach(), w.grad

    for rank, (y, grad) in enumerate(LocalWorld(3).run(work)):
        assert torch.equal(y, expected[rank])
        exact = [
            [outs[r][row].float().sum() for k in range(2) for r in range(3)
             for row, pair in enumerate(rows[r].pairs) if pair == (rank, t, k)]
            for t in range(len(x[rank]))
        ]  # fmt: skip
        torch.testing.assert_close(grad, torch.tensor(exact).view(-1, 2), rtol=1e-2, atol=1e-2)


def test_two_operations_overlap_with_two_buffers():
    def work(group):
        ep = ExpertParallel(group, num_buffers=2, **SMALL)
        x = torch.full((1, 2), 1.0 + ep.rank)
        first = ep.dispatch(x, ids([0]), async_op=True)
        second = ep.dispatch(x * 10, ids([3]), async_op=True)
        with pytest.raises(EPMisuse, match="combine: expected at most 2 operations under way"):
            ep.combine(x, None)
        late, early = second.wait(), first.wait()
        assert first.wait() is early
        home = [
            ep.combine(rows.x * factor, rows.handle, async_op=True)
            for rows, factor in ((late, 1), (early, 2))
        ]
        return [pending.wait().tolist() for pending in home]

    found = LocalWorld(2).run(work)
    assert found == [[[[10.0, 10.0]], [[2.0, 2.0]]], [[[20.0, 20.0]], [[4.0, 4.0]]]]


def test_misuse_is_an_error_of_its_own():
    def work(group):
        ep, other = (ExpertParallel(group, **SMALL) for _ in range(2))
        x = torch.ones(1, 2)
        pending = ep.dispatch(x, ids([0]), async_op=True)
        with pytest.raises(EPMisuse, match="at most 1 operations under way, this would be 2"):
            ep.dispatch(x, ids([0]))
        rows = pending.wait()
        with pytest.raises(EPMisuse, match="another's"):
            other.combine(rows.x, rows.handle)
        with pytest.raises(EPMisuse, match="another's"):
            other.dispatch(x, handle=rows.handle)
        ep.combine(rows.x, rows.handle)
        with pytest.raises(EPMisuse, match="not combined yet"):
            ep.combine(rows.x, rows.handle)
        with pytest.raises(TypeError, match="pass .handle of its result"):
            ep.combine(rows.x, rows)
        ep.close()
        ep.close()
        with pytest.raises(EPMisuse, match="out of use: it was closed"):
            ep.dispatch(x, ids([0]))
        return other.combine(*(lambda d: (d.x, d.handle))(other.dispatch(x, ids([0])))).tolist()

    assert LocalWorld(2).run(work) == [[[1.0, 1.0]]] * 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"hidden": 3}, r"ExpertParallel: hidden: .*; rank 0 has 2, rank 1 has 3"),
        ({"layout": "expert_direct"}, "layout: .*rank 0 has rank_dedup, rank 1 has expert_direct"),
        (
            {"wire_dtype": torch.bfloat16},
            "wire_dtype: .*rank 0 has None, rank 1 has torch.bfloat16",
        ),
        ({"max_tokens_per_rank": 9}, "max_tokens_per_rank"),
    ],
)
def test_other_options_on_a_rank_are_an_error_of_all(changed, told):
    def work(group):
        with pytest.raises(EPMismatch, match=told) as caught:
            ExpertParallel(group, **{**SMALL, **(changed if group.rank == 1 else {})})
        return str(caught.value)

    assert len(set(LocalWorld(3).run(work))) == 1


def test_what_one_rank_refuses_is_told_to_all():
    def work(group):
        bad = group.rank == 1
        with pytest.raises(ValueError if bad else EPPeerError, match="hidden: expected 1"):
            ExpertParallel(group, **{**SMALL, **({"hidden": 0} if bad else {})})
        ep = ExpertParallel(group, **SMALL)
        x = torch.ones(1, 2)
        for broken, told in (
            ({"indices": ids([7])}, r"ids in -1 .. 4, got 7 .. 7"),
            ({"x": torch.ones(9, 2), "indices": ids(*[[0]] * 9)}, "at most max_tokens_per_rank"),
            ({"x": torch.ones(1, 3)}, "x: expected shape"),
            ({"weights": torch.ones(2, 1)}, "weights: expected shape"),
        ):
            call = {"x": x, "indices": ids([0]), **(broken if bad else {})}
            with pytest.raises(ValueError if bad else EPPeerError, match=told) as caught:
                ep.dispatch(**call)
            assert bad or (caught.value.ranks == (1,) and "rank 1: dispatch" in str(caught.value))
        with pytest.raises(EPMismatch, match="top_k: .*rank 0 has 1, rank 1 has 2"):
            ep.dispatch(x, ids([0] * (1 + bad)))
        with pytest.raises(EPMismatch, match="dtype of x: .*rank 0 has float32, rank 1 has bfl"):
            ep.dispatch(x.bfloat16() if bad else x, ids([0]))
        with pytest.raises(EPMismatch, match="gradients wanted"):
            ep.dispatch(x.clone().requires_grad_(bad), ids([0]))
        rows = ep.dispatch(x, ids([0]))  # the group is as good as before
        return ep.combine(rows.x, rows.handle).tolist()

    assert LocalWorld(2).run(work) == [[[1.0, 1.0]]] * 2


def test_whatever_one_rank_raises_is_told_to_all(monkeypatch):
    depart, planned = router.depart, threading.local()

    def fails(*arguments):
        if getattr(planned, "badly", False):
            raise MemoryError("no room for the plan")
        return depart(*arguments)

    monkeypatch.setattr(router, "depart", fails)

    def work(group):
        ep, bad = ExpertParallel(group, timeout=5.0, **SMALL), group.rank == 1
        planned.badly = bad
        with pytest.raises(MemoryError if bad else EPPeerError, match="no room for the plan"):
            ep.dispatch(torch.ones(1, 2), ids([0]))
        planned.badly = False
        rows = ep.dispatch(torch.ones(1, 2), ids([0]))  # the group is as good as before
        return ep.combine(rows.x, rows.handle).tolist()

    assert LocalWorld(2).run(work) == [[[1.0, 1.0]]] * 2


def test_overflow_is_raised_on_every_rank_before_a_row_moves():
    def work(group):
        ep = ExpertParallel(group, capacity=3, **SMALL)
        told = "capacity: expected at most 3 rows a rank, rank 1 would get 4"
        with pytest.raises(EPOverflow, match=told) as caught:
            ep.dispatch(torch.ones(2, 2), ids([2], [3]))
        assert caught.value.ranks == (1,) and caught.value.count == 4
        return ep.dispatch(torch.ones(1, 2), ids([2])).x.tolist()

    assert LocalWorld(2).run(work) == [[[0.0, 0.0]] * 3, [[1.0, 1.0]] * 2 + [[0.0, 0.0]]]


def test_a_capacity_that_grew_stays():
    def work(group):
        ep = ExpertParallel(group, capacity=3, overflow="grow", **SMALL)
        sizes = [len(ep.dispatch(torch.ones(n, 2), ids(*[[0]] * n)).x) for n in (1, 2, 1)]
        return sizes, ep.capacity

    assert LocalWorld(2).run(work) == [([3, 6, 6], 6)] * 2


def test_ranks_that_call_something_else_are_named():
    def work(group):
        ep = ExpertParallel(group, **SMALL)
        rows = ep.dispatch(torch.ones(1, 2), ids([0]))
        with pytest.raises(EPMismatch, match="made another call than rank") as caught:
            if group.rank == 1:
                ep.combine(rows.x, rows.handle)
            else:
                ep.dispatch(torch.ones(1, 2), ids([0]))
        return caught.value.ranks

    assert LocalWorld(2).run(work) == [(1,), (0,)]


def test_ranks_that_do_not_come_are_named():
    def work(group):
        ep = ExpertParallel(group, timeout=0.3, **SMALL)
        if group.rank == 2:
            time.sleep(1)
            return None
        start = time.monotonic()
        with pytest.raises(EPTimeout, match=r"rank 2 did not come within 0.3 s") as caught:
            ep.dispatch(torch.ones(1, 2), ids([0]))
        assert caught.value.ranks == (2,) and time.monotonic() - start < 0.8
        with pytest.raises(EPMisuse, match="out of use: rank 2 did not come"):
            ep.dispatch(torch.ones(1, 2), ids([0]))
        return None

    LocalWorld(3).run(work)


def test_a_rank_that_raises_is_lost_to_the_others():
    before = threading.active_count()

    def work(group):
        ep = ExpertParallel(group, **SMALL)
        rows = ep.dispatch(torch.ones(1, 2), ids([0]))
        if group.rank == 1:
            raise KeyError("the cause")
        with pytest.raises(EPRankLost) as caught:
            ep.combine(rows.x, rows.handle)
        assert caught.value.ranks == (1,) and isinstance(caught.value, (EPError, ConnectionError))

    start = time.monotonic()
    with pytest.raises(KeyError, match="the cause") as caught:
        LocalWorld(3).run(work)
    assert time.monotonic() - start < 5 and "rank 1" in caught.value.__notes__[0]
    assert threading.active_count() == before


def test_the_backend_is_told(caplog):
    with caplog.at_level(logging.INFO, "kimi_ops.parallel"):
        backends = LocalWorld(2).run(lambda group: ExpertParallel(group, **SMALL).backend)
    assert backends == ["reference"] * 2
    assert "rank 0 of 2: reference: 2 ranks are threads of one process" in caplog.text


def test_the_mode_of_the_caller_holds_in_all_ranks():
    def work(group):
        ep = ExpertParallel(group, **SMALL)
        return ep.dispatch(torch.ones(1, 2, requires_grad=True), ids([0])).x.requires_grad

    assert LocalWorld(2).run(work) == [True, True]
    with torch.no_grad():
        assert LocalWorld(2).run(work) == [False, False]


def test_it_is_public():
    assert {"ExpertParallel", "LocalWorld"} <= set(kimi_ops.__all__)
