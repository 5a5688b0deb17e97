# SPDX-License-Identifier: MIT
"""permute_plan, permute, unpermute and sort_chunks against sorting and indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimi_ops.permute import PermutePlan, permute, permute_plan, sort_chunks, unpermute


def random_ids(tokens: int, experts: int, k: int, drop: float, seed: int) -> Tensor:
    """Distinct experts in each row, some slots dropped, load skewed to low ids."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens, experts, generator=generator) - torch.linspace(0, 1, experts) ** 2
    ids = noise.argsort(dim=1)[:, :k].int()
    return ids.masked_fill(torch.rand(tokens, k, generator=generator) < drop, -1)


def expected_plan(ids: Tensor, experts: int, align: int) -> PermutePlan:
    """The same plan with Python lists."""
    tokens, k = ids.shape
    flat = ids.flatten().tolist()
    row_map, source = [-1] * len(flat), [-1] * (len(flat) + experts * (align - 1))
    offsets, counts, row = [], [], 0
    for expert in range(experts):
        pairs = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        for place, pair in enumerate(pairs):
            row_map[pair], source[row + place] = row + place, pair
        row += -(-len(pairs) // align) * align
        offsets.append(row)
        counts.append(len(pairs))
    return PermutePlan(
        torch.tensor(row_map, dtype=torch.int32).view(tokens, k),
        torch.tensor(source, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
    )


CASES = st.tuples(
    st.integers(0, 40),  # T
    st.integers(1, 20),  # E
    st.integers(1, 6),  # K
    st.sampled_from([1, 2, 3, 8, 16]),  # align
    st.sampled_from([0.0, 0.3, 1.0]),  # dropped share
    st.integers(0, 2**31),
)


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_plan_and_copies_equal_lists_and_indexing(case):
    tokens, experts, k, align, drop, seed = case
    k = min(k, experts)
    ids = random_ids(tokens, experts, k, drop, seed)
    plan = permute_plan(ids, experts, align=align)
    for name, ours, expected in zip(
        plan._fields, plan, expected_plan(ids, experts, align), strict=True
    ):
        assert ours.dtype == torch.int32 and torch.equal(ours, expected), name

    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))
    y = permute(x, plan)
    assert y.shape == (tokens * k + experts * (align - 1), 5)
    for row, source in enumerate(plan.source.tolist()):
        assert torch.equal(y[row], x[source // k] if source >= 0 else torch.zeros(5))

    weights = torch.rand(tokens, k, generator=torch.Generator().manual_seed(seed + 1))
    for w in (None, weights):
        out = unpermute(y, plan, w)
        share = torch.ones_like(weights) if w is None else w
        total = share.double().masked_fill(ids < 0, 0).sum(1, keepdim=True)
        torch.testing.assert_close(out.double(), x.double() * total, rtol=1e-5, atol=1e-6)


def test_the_order_is_that_of_a_stable_argsort():
    ids = random_ids(1000, 384, 8, 0.0, 0)
    plan = permute_plan(ids, 384)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(plan.source.long(), order)
    x = torch.randn(1000, 16)
    assert torch.equal(permute(x, plan), x.index_select(0, order // 8))
    assert torch.equal(plan.tokens_per_expert, ids.flatten().bincount(minlength=384).int())
    assert torch.equal(plan.offsets.long(), plan.tokens_per_expert.cumsum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_are_added_in_order_in_float32(dtype):
    ids = random_ids(50, 9, 4, 0.2, 1)
    plan = permute_plan(ids, 9, align=4)
    y = torch.randn(plan.source.numel(), 33).to(dtype)
    weights = torch.randn(50, 4)
    out = torch.zeros(50, 33)
    for slot in range(4):
        row = plan.row_map[:, slot].long()
        term = torch.addcmul(out, y[row.clamp(min=0)].float(), weights[:, slot, None])
        out = torch.where(row[:, None] < 0, out, term)
    result = unpermute(y, plan, weights)
    assert result.dtype == dtype
    torch.testing.assert_close(result, out.to(dtype), rtol=0, atol=0)


def test_rows_outside_the_groups_are_never_read():
    ids = torch.tensor([[0, -1], [-1, 2]], dtype=torch.int32)
    plan = permute_plan(ids, 3, align=2)
    rows = permute(torch.ones(2, 4), plan)
    poisoned = rows.masked_fill(plan.source[:, None] < 0, torch.nan).requires_grad_()
    weights = torch.tensor([[0.5, torch.inf], [torch.nan, 2.0]], requires_grad=True)
    out = unpermute(poisoned, plan, weights)
    assert out.tolist() == [[0.5] * 4, [2.0] * 4]
    out.sum().backward()
    assert weights.grad.tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert torch.equal(poisoned.grad != 0, (plan.source >= 0)[:, None].expand(-1, 4))


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_gradients(align, drop):
    ids = random_ids(6, 5, 3, drop, 2)
    plan = permute_plan(ids, 5, align=align)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(
        plan.source.numel(), 4, dtype=torch.float64, generator=generator, requires_grad=True
    )
    weights = torch.rand(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: permute(t, plan), [x])
    assert torch.autograd.gradcheck(lambda t: unpermute(t, plan), [y])
    assert torch.autograd.gradcheck(lambda t, w: unpermute(t, plan, w), [y, weights])
    assert torch.autograd.gradgradcheck(lambda t, w: unpermute(t, plan, w), [y, weights])


def test_non_contiguous_gradients_and_inputs():
    ids = random_ids(6, 5, 2, 0.0, 4)
    plan = permute_plan(ids.t().contiguous().t(), 5)
    assert torch.equal(plan.row_map, permute_plan(ids, 5).row_map)
    x = torch.randn(4, 6).t().requires_grad_()
    rows = permute(x, plan)
    assert torch.equal(rows, x[plan.source.long() // 2])
    rows.backward(torch.randn(4, 12).t())
    other = torch.zeros(6, 4).index_add(0, plan.source.long() // 2, torch.ones(12, 4))
    x.grad = None
    permute(x, plan).backward(torch.ones(1, 1).expand(12, 4))
    torch.testing.assert_close(x.grad, other)


def test_gradient_of_permute_is_summed_in_float32():
    ids = torch.arange(8, dtype=torch.int32)[None]
    plan = permute_plan(ids, 8)
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    # 256 + 1 + ... + 1: every partial sum in bf16 would stay at 256.
    permute(x, plan).backward(torch.tensor([[256.0]] + [[1.0]] * 7).bfloat16())
    assert float(x.grad) == 264.0


def test_twenty_runs_have_the_same_bits():
    ids = random_ids(300, 16, 4, 0.1, 5)
    x, weights = torch.randn(300, 64), torch.rand(300, 4)
    results = []
    for _ in range(20):
        plan = permute_plan(ids, 16, align=8)
        results.append(unpermute(permute(x, plan), plan, weights))
    assert all(torch.equal(results[0], other) for other in results)


def test_shapes_of_38_000_tokens_on_the_meta_device():
    ids = torch.empty(38_000, 8, dtype=torch.int32, device="meta")
    plan = permute_plan(ids, 384, align=128)
    rows = 38_000 * 8 + 384 * 127
    assert plan.source.shape == (rows,)
    x = torch.empty(38_000, 7168, dtype=torch.bfloat16, device="meta")
    y = permute(x, plan)
    assert y.shape == (rows, 7168) and y.numel() > 2**31
    assert unpermute(y, plan, torch.empty(38_000, 8, device="meta")).shape == x.shape


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.randoms(), st.integers(0, 4))
def test_sort_chunks_equals_split_and_concatenate(sizes, random, tail):
    order = list(range(len(sizes)))
    random.shuffle(order)
    rows = sum(sizes)
    x = torch.randn(rows + tail, 3, dtype=torch.float64, requires_grad=True)
    split_sizes = torch.tensor(sizes, dtype=torch.int32)
    result = sort_chunks(x, split_sizes, torch.tensor(order, dtype=torch.int32))
    chunks = x[:rows].split(sizes)
    expected = torch.cat([chunks[i] for i in order] + [torch.zeros(tail, 3)])
    assert torch.equal(result, expected)
    weight = torch.randn(result.shape)
    (result * weight).sum().backward()
    first, x.grad = x.grad, None
    (expected * weight + 0 * x).sum().backward()
    assert torch.equal(first, x.grad)


IDS = torch.zeros(2, 2, dtype=torch.int32)
BAD_PLANS = [
    ((IDS.long(), 4, 1), TypeError, "permute_plan: indices: expected int32, got torch.int64"),
    ((IDS[0], 4, 1), ValueError, r"permute_plan: indices: expected shape \[T, K\]"),
    ((IDS[:, :0], 4, 1), ValueError, r"permute_plan: indices: expected shape \[T, K\] with K >= 1"),
    ((IDS, 0, 1), ValueError, "permute_plan: num_experts: expected at least 1"),
    ((IDS, 2.0, 1), TypeError, "permute_plan: num_experts: expected an int, got float"),
    ((IDS, 4, 0), ValueError, "permute_plan: align: expected at least 1"),
    (
        (IDS + 4, 4, 1),
        ValueError,
        r"permute_plan: indices: expected ids in -1 \.\. 3, got 4 \.\. 4",
    ),
    ((IDS - 2, 4, 1), ValueError, r"permute_plan: indices: expected ids in -1 \.\. 3, got -2"),
    ((IDS, 2**20, 2**12), ValueError, "permute_plan: indices: expected at most 2147483647 rows"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_PLANS)
def test_bad_plans(arguments, error, message):
    with pytest.raises(error, match=message):
        permute_plan(arguments[0], arguments[1], align=arguments[2])


PLAN = permute_plan(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), 2)
BAD_CALLS = [
    (
        lambda: permute(torch.zeros(3, 4), PLAN),
        ValueError,
        r"permute: x: expected shape \[T=2, H\]",
    ),
    (lambda: permute(torch.zeros(2), PLAN), ValueError, r"permute: x: expected shape \[T=2, H\]"),
    (lambda: permute(IDS, PLAN), TypeError, "permute: x: expected a floating dtype"),
    (
        lambda: permute(torch.zeros(2, 4, device="meta"), PLAN),
        ValueError,
        "permute: x: expected device cpu",
    ),
    (
        lambda: unpermute(torch.zeros(2, 4), PLAN),
        ValueError,
        r"unpermute: y: expected shape \[cap=4, H\]",
    ),
    (
        lambda: unpermute(torch.zeros(4, 4), PLAN, torch.zeros(2, 3)),
        ValueError,
        r"unpermute: weights: expected shape \[2, 2\], got \[2, 3\]",
    ),
    (
        lambda: unpermute(torch.zeros(4, 4), PLAN, torch.zeros(2, 2).bfloat16()),
        TypeError,
        "unpermute: weights: expected torch.float32 beside torch.float32 rows",
    ),
    (
        lambda: unpermute(torch.zeros(4, 4), PLAN, torch.zeros(2, 2, device="meta")),
        ValueError,
        "unpermute: weights: expected device cpu",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


BAD_CHUNKS = [
    ([1, 2], [0, 0], ValueError, r"order: expected a permutation of 0 \.\. 1"),
    ([1, 2], [0, 2], ValueError, r"order: expected a permutation of 0 \.\. 1"),
    ([1, 3], [0, 1], ValueError, "split_sizes: expected sizes >= 0 with a sum <= R = 3"),
    ([4, -1], [0, 1], ValueError, "split_sizes: expected sizes >= 0"),
    ([1, 2], [0], ValueError, r"order: expected shape \[2\]"),
    ([1.0, 2.0], [0, 1], TypeError, "split_sizes: expected int32, got torch.float32"),
]


@pytest.mark.parametrize(("sizes", "order", "error", "message"), BAD_CHUNKS)
def test_bad_chunks(sizes, order, error, message):
    kind = torch.float32 if isinstance(sizes[0], float) else torch.int32
    with pytest.raises(error, match=f"sort_chunks: {message}"):
        sort_chunks(torch.zeros(3, 2), torch.tensor(sizes, dtype=kind), torch.tensor(order).int())
