# SPDX-License-Identifier: MIT
"""permute_plan, permute, unpermute and sort_chunks against lists, sorting and indexing, on every
engine: plans and copies exactly, sums bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimi_ops import (
    PermutePlan,
    permute,
    permute_plan,
    permute_weights,
    sort_chunks,
    unpermute,
)
from kimi_ops.reference import permute as reference

FUZZ = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@settings(max_examples=60, **FUZZ)
@given(case=CASES)
def test_plan_and_copies_equal_lists_and_indexing(engine, case):
    tokens, experts, k, align, drop, seed = case
    k = min(k, experts)
    ids = random_ids(tokens, experts, k, drop, seed)
    plan = permute_plan(ids.to(engine.device), experts, align=align)
    for name, ours, expected in zip(
        plan._fields, plan, expected_plan(ids, experts, align), strict=True
    ):
        assert ours.dtype == torch.int32 and torch.equal(ours.cpu(), expected), name

    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))
    y = permute(x.to(engine.device), plan)
    assert y.shape == (tokens * k + experts * (align - 1), 5)
    for row, source in enumerate(plan.source.tolist()):
        assert torch.equal(y[row].cpu(), x[source // k] if source >= 0 else torch.zeros(5))

    weights = torch.rand(tokens, k, generator=torch.Generator().manual_seed(seed + 1))
    for w in (None, weights):
        out = unpermute(y, plan, None if w is None else w.to(engine.device))
        share = torch.ones_like(weights) if w is None else w
        total = share.double().masked_fill(ids < 0, 0).sum(1, keepdim=True)
        torch.testing.assert_close(out.cpu().double(), x.double() * total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tokens,experts,k,align,drop",
    [(1000, 384, 8, 1, 0.0), (333, 896, 16, 64, 0.1), (5000, 7, 3, 128, 0.5), (70, 32, 32, 16, 0.0),
     (1, 384, 8, 1, 0.0), (400, 1, 1, 1, 0.0), (64, 384, 8, 1, 1.0), (1024, 1024, 2, 1, 0.0)],
)  # fmt: skip
def test_plan_equals_a_stable_argsort(engine, tokens, experts, k, align, drop):
    ids = random_ids(tokens, experts, k, drop, tokens)
    ids = torch.where(torch.arange(tokens)[:, None] % 3 == 0, ids, ids.where(ids >= 0, experts))
    plan = permute_plan(ids.to(engine.device), experts, align=align)
    want = reference.permute_plan(ids.where(ids < experts, -1), experts, align)
    for name, a, b in zip(plan._fields, plan, want, strict=True):
        assert torch.equal(a.cpu(), b), name
    flat = ids.flatten().long()
    flat = flat.masked_fill(flat < 0, experts)
    order = flat.argsort(stable=True)[: int((flat < experts).sum())]
    assert torch.equal(plan.source[plan.source >= 0].cpu().long(), order)


def test_one_expert_takes_all(engine):
    ids = torch.full((700, 1), 3, dtype=torch.int32)
    plan = permute_plan(ids.to(engine.device), 5, align=16)
    assert plan.tokens_per_expert.tolist() == [0, 0, 0, 700, 0]
    assert plan.offsets.tolist() == [0, 0, 0, 704, 704]
    assert plan.row_map.flatten().tolist() == list(range(700))


@pytest.mark.parametrize("hidden", [1, 3, 8, 63, 64, 65, 256, 300, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_engines_follow_the_contract_bit_for_bit(engine, dtype, hidden):
    """Sums, products and the dot product in the order that csrc/permute/permute.h states."""
    tokens, k = (7, 3) if engine.slow else (33, 5)
    plan = permute_plan(random_ids(tokens, 9, k, 0.2, 1).to(engine.device), 9, align=4)
    generator = torch.Generator().manual_seed(hidden)
    y = torch.randn(plan.source.numel(), hidden, generator=generator).to(dtype)
    weights = torch.randn(tokens, k, generator=generator)
    dx = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ours, w = y.to(engine.device).requires_grad_(), weights.to(engine.device).requires_grad_()
    x = unpermute(ours, plan, w)
    x.backward(dx.to(engine.device))

    row_map, source = plan.row_map.cpu(), plan.source.cpu()
    total = torch.zeros(tokens, hidden)
    for slot in range(k):
        row = row_map[:, slot].long()
        # fp64 holds an fp32 fma exactly but for its rounding
        term = (total.double() + weights[:, slot, None].double() * y[row].double()).float()
        total = torch.where(row[:, None] < 0, total, term)
    assert torch.equal(x.detach().cpu(), total.to(dtype))

    pair = source.long().clamp(min=0)
    grad_y = (weights.flatten()[pair, None] * dx[pair // k].float()).to(dtype)
    assert torch.equal(ours.grad.cpu(), grad_y.masked_fill(source[:, None] < 0, 0))

    width = -(-hidden // 256) * 256
    a, b = torch.zeros(tokens, k, width), torch.zeros(tokens, k, width)
    a[..., :hidden], b[..., :hidden] = dx[:, None].float(), y[row_map.long()].float()
    partial = torch.zeros(tokens, k, 256)
    for i in range(0, width, 256):
        product = a[..., i : i + 256].double() * b[..., i : i + 256].double()
        partial = (partial.double() + product).float()
    while partial.shape[-1] > 1:
        half = partial.shape[-1] // 2
        partial = partial[..., :half] + partial[..., half:]
    assert torch.equal(w.grad.cpu(), partial[..., 0].masked_fill(row_map < 0, 0))


def test_without_weights_rows_are_added(engine):
    plan = permute_plan(random_ids(40, 9, 4, 0.2, 1).to(engine.device), 9)
    y = torch.randn(plan.source.numel(), 70, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(40, 70)
    for slot in range(4):
        row = plan.row_map[:, slot].long().cpu()
        total = torch.where(row[:, None] < 0, total, total + y[row])
    assert torch.equal(unpermute(y.to(engine.device), plan).cpu(), total)


def test_large_rows_go_around_the_cache(engine):
    """Above 32 MB rows are written with streaming stores; also from and to odd addresses."""
    tokens, hidden = (3, 40) if engine.slow else (700, 4099)
    plan = permute_plan(random_ids(tokens, 16, 8, 0.1, 2).to(engine.device), 16, align=3)
    x = torch.randn(tokens, hidden).bfloat16().to(engine.device)
    y = permute(x, plan)
    pair = plan.source.long()
    assert torch.equal(y, x[pair // 8].masked_fill((pair < 0)[:, None], 0))
    w = torch.rand(tokens, 8).to(engine.device).requires_grad_()
    rows = y.clone().requires_grad_()
    unpermute(rows, plan, w).backward(x)
    scale = permute_weights(w.detach(), plan)[:, None]
    assert torch.equal(rows.grad, (scale * y.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_any_payload_moves_byte_for_byte(engine, dtype):
    plan = permute_plan(random_ids(20, 6, 3, 0.2, 3).to(engine.device), 6, align=2)
    raw = torch.randint(0, 120, (20, 48), dtype=torch.uint8, device=engine.device)
    x = raw.bool() if dtype == torch.bool else raw.view(dtype)
    pair = plan.source.long()
    for rows in (x, x[:, 5:] if x.shape[1] > 16 else x):
        want = rows[pair // 3].view(torch.uint8).masked_fill((pair < 0)[:, None], 0)
        assert torch.equal(permute(rows, plan).view(torch.uint8), want)


def test_quantised_rows_travel_with_their_scales(engine):
    """fp8 rows and their 1 x 128 scales, permuted apart, give the permuted fp32 rows."""
    plan = permute_plan(random_ids(20, 6, 3, 0.0, 3).to(engine.device), 6)
    x = torch.randn(20, 256).to(engine.device)
    scales = x.view(20, 2, 128).abs().amax(-1) / 448
    quantised = (x.view(20, 2, 128) / scales[..., None]).view(20, 256).to(torch.float8_e4m3fn)
    rows, row_scales = permute(quantised, plan), permute(scales, plan)
    back = (rows.float().view(-1, 2, 128) * row_scales[..., None]).view(-1, 256)
    assert (back - permute(x, plan)).abs().max() < 0.07 * x.abs().max()


def test_weights_travel_beside_rows(engine):
    plan = permute_plan(random_ids(30, 8, 3, 0.2, 6).to(engine.device), 8, align=4)
    x = torch.randn(30, 16).to(engine.device)
    w = torch.rand(30, 3).to(engine.device).requires_grad_()
    rows = permute(x, plan) * permute_weights(w, plan)[:, None]
    later = unpermute(rows, plan)
    torch.testing.assert_close(later, unpermute(permute(x, plan), plan, w))
    later.sum().backward()
    want = x.sum(1, keepdim=True).expand(30, 3).masked_fill(plan.row_map < 0, 0)
    torch.testing.assert_close(w.grad, want, rtol=1e-5, atol=1e-5)


def test_rows_outside_the_groups_are_never_read(engine):
    ids = torch.tensor([[0, -1], [-1, 2]], dtype=torch.int32)
    plan = permute_plan(ids.to(engine.device), 3, align=2)
    rows = permute(torch.ones(2, 4).to(engine.device), plan)
    poisoned = rows.masked_fill(plan.source[:, None] < 0, torch.nan).requires_grad_()
    weights = torch.tensor([[0.5, torch.inf], [torch.nan, 2.0]]).to(engine.device)
    weights.requires_grad_()
    out = unpermute(poisoned, plan, weights)
    assert out.tolist() == [[0.5] * 4, [2.0] * 4]
    out.sum().backward()
    assert weights.grad.tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert torch.equal(poisoned.grad != 0, (plan.source >= 0)[:, None].expand(-1, 4))


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_reference_gradients(align, drop):
    plan = permute_plan(random_ids(6, 5, 3, drop, 2), 5, align=align)
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    x, y, weights = leaf(6, 4), leaf(plan.source.numel(), 4), leaf(6, 3)
    assert torch.autograd.gradcheck(lambda t: reference.permute(t, plan), [x])
    assert torch.autograd.gradcheck(lambda t: reference.unpermute(t, plan), [y])
    assert torch.autograd.gradcheck(lambda t, w: reference.unpermute(t, plan, w), [y, weights])


def test_gradients_against_the_fp64_twin(engine):
    plan = permute_plan(random_ids(12, 5, 3, 0.2, 2).to(engine.device), 5, align=2)
    twin = PermutePlan(*(t.cpu() for t in plan))
    x, w = torch.randn(12, 70), torch.rand(12, 3)
    grad = torch.randn(12, 70)

    def run(module_permute, module_unpermute, plan, x, w, grad):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        rows = module_permute(x, plan)
        module_unpermute(torch.tanh(rows), plan, w).backward(grad)
        return x.grad.cpu().double(), w.grad.cpu().double()

    device = engine.device
    got = run(permute, unpermute, plan, x.to(device), w.to(device), grad.to(device))
    want = run(reference.permute, reference.unpermute, twin, x.double(), w.double(), grad.double())
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


def test_non_contiguous_gradients_and_inputs(engine):
    device = engine.device
    ids = random_ids(6, 5, 2, 0.0, 4).to(device)
    plan = permute_plan(ids.t().contiguous().t(), 5)
    assert torch.equal(plan.row_map, permute_plan(ids, 5).row_map)
    for view in (torch.randn(4, 6).t(), torch.randn(6, 9)[:, 2:6], torch.randn(1, 4).expand(6, 4)):
        x = view.to(device).detach().requires_grad_()
        rows = permute(x, plan)
        assert torch.equal(rows, x[plan.source.long() // 2])
        (dense,) = torch.autograd.grad(rows, x, torch.ones(12, 4).to(device), retain_graph=True)
        (wide,) = torch.autograd.grad(rows, x, torch.ones(1, 1).to(device).expand(12, 4))
        assert torch.equal(dense, wide) and (dense == 2).all()
    w = torch.rand(2, 6).t().to(device)
    y = torch.randn(4, 12).t().to(device)
    assert torch.equal(unpermute(y, plan, w), unpermute(y.contiguous(), plan, w.contiguous()))


def test_gradient_of_permute_is_summed_in_float32(engine):
    plan = permute_plan(torch.arange(8, dtype=torch.int32)[None].to(engine.device), 8)
    x = torch.zeros(1, 1, dtype=torch.bfloat16, device=engine.device, requires_grad=True)
    # 256 + 1 + ... + 1: every partial sum in bf16 would stay at 256.
    grad = torch.tensor([[256.0]] + [[1.0]] * 7).bfloat16().to(engine.device)
    permute(x, plan).backward(grad)
    assert float(x.grad) == 264.0


def test_repeats_and_threads_give_the_same_bits(engine, two_thread_counts):
    tokens = 60 if engine.slow else 3000
    ids = random_ids(tokens, 64, 4, 0.1, 5).to(engine.device)
    x, weights = torch.randn(tokens, 64).to(engine.device), torch.rand(tokens, 4).to(engine.device)
    first = None
    for threads in (*two_thread_counts, *[two_thread_counts[1]] * 18):
        torch.set_num_threads(threads)
        plan = permute_plan(ids, 64, align=8)
        rows, w = permute(x, plan).requires_grad_(), weights.clone().requires_grad_()
        out = unpermute(rows, plan, w)
        out.backward(x)
        results = (*plan, out.detach(), rows.grad, w.grad)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_empty(engine):
    ids = torch.zeros(0, 8, dtype=torch.int32, device=engine.device)
    for align in (1, 16):
        plan = permute_plan(ids, 4, align=align)
        assert plan.source.tolist() == [-1] * (4 * (align - 1))
        assert not plan.offsets.any() and not plan.tokens_per_expert.any()
        x = torch.zeros(0, 32, device=engine.device, requires_grad=True)
        rows = permute(x, plan)
        assert not rows.any()
        unpermute(rows, plan, torch.zeros(0, 8, device=engine.device)).sum().backward()
        assert x.grad.shape == (0, 32)
    assert permute(torch.zeros(0, 0, device=engine.device), plan).shape == (60, 0)


def test_shapes_of_38_000_tokens_on_the_meta_device():
    ids = torch.empty(38_000, 8, dtype=torch.int32, device="meta")
    plan = permute_plan(ids, 384, align=128)
    rows = 38_000 * 8 + 384 * 127
    assert plan.source.shape == (rows,)
    x = torch.empty(38_000, 7168, dtype=torch.bfloat16, device="meta")
    y = permute(x, plan)
    assert y.shape == (rows, 7168) and y.numel() > 2**31
    assert unpermute(y, plan, torch.empty(38_000, 8, device="meta")).shape == x.shape


def test_rows_are_addressed_in_64_bits(engine):
    """Rows 2^30 elements apart: the third begins past 2^31. Only their pages are touched."""
    if engine.device == "cuda":
        pytest.skip("4 GiB of address space is cheap on a CPU only")
    x = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((3, 8), (2**30, 1))
    x.copy_(torch.arange(24.0).view(3, 8))
    plan = permute_plan(torch.tensor([[1], [0], [0]], dtype=torch.int32), 2)
    assert permute(x, plan)[:, 0].tolist() == [8.0, 16.0, 0.0]
    assert unpermute(x, plan)[:, 0].tolist() == [16.0, 0.0, 8.0]


@settings(max_examples=60, **FUZZ)
@given(sizes=st.lists(st.integers(0, 5), max_size=8), random=st.randoms(), tail=st.integers(0, 4))
def test_sort_chunks_equals_split_and_concatenate(engine, sizes, random, tail):
    order = list(range(len(sizes)))
    random.shuffle(order)
    rows = sum(sizes)
    x = torch.randn(rows + tail, 3).to(engine.device).requires_grad_()
    split_sizes = torch.tensor(sizes, dtype=torch.int32).to(engine.device)
    result = sort_chunks(x, split_sizes, torch.tensor(order).int().to(engine.device))
    chunks = x[:rows].split(sizes)
    zeros = torch.zeros(tail, 3).to(engine.device)
    expected = torch.cat([chunks[i] for i in order] + [zeros])
    assert torch.equal(result, expected)
    weight = torch.randn(result.shape).to(engine.device)
    (result * weight).sum().backward()
    first, x.grad = x.grad, None
    (expected * weight + 0 * x).sum().backward()
    assert torch.equal(first, x.grad)


def test_sort_chunks_of_many_chunks(engine):
    """(rank, expert) chunks become (expert, rank) chunks, as after an all-to-all."""
    ranks, experts = (4, 48) if engine.slow else (16, 384)
    sizes = torch.randint(0, 4, (ranks * experts,), generator=torch.Generator().manual_seed(0))
    order = torch.arange(ranks * experts).view(ranks, experts).t().flatten()
    x = torch.arange(int(sizes.sum()) * 2.0).view(-1, 2)
    got = sort_chunks(*(t.to(engine.device) for t in (x, sizes.int(), order.int())))
    chunks = x.split(sizes.tolist())
    assert torch.equal(got.cpu(), torch.cat([chunks[i] for i in order.tolist()]))
