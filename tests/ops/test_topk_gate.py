# SPDX-License-Identifier: MIT
"""topk_gate against scalar fp64 arithmetic, the torch twin and transformers, on every engine."""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_ops import _native, topk_gate
from kimi_ops.reference import topk_gate as reference

SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def hard_rows(tokens, experts, dtype, seed=0):
    """Normal logits with rows of NaN, infinities, ties, zeros and saturated values among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, experts, generator=generator) * 3
    specials = [
        torch.full((experts,), math.nan),
        torch.full((experts,), -math.inf),
        torch.ones(experts),
        torch.zeros(experts),
        torch.full((experts,), -200.0),
        torch.full((experts,), 90.0),
        torch.where(torch.arange(experts) % 2 == 0, math.nan, x[0]),
        torch.where(torch.arange(experts) % 3 == 0, math.inf, x[0]),
        torch.where(torch.arange(experts) % 2 == 0, -0.0, 0.0),
        torch.arange(experts) * 0.01,
        torch.arange(experts).flip(0) * 0.01,
        x[0].round(),
        torch.linspace(-4e-7, 4e-7, experts),  # the one inexact case of the reciprocal
    ]
    for row, special in zip(range(1, tokens, 2), specials, strict=False):
        x[row] = special
    return x.to(dtype)


@contextlib.contextmanager
def portable():
    """CPU tensors are served by the portable engine."""
    saved, isa = _native.engine, _native._C.current_isa()
    _native.engine = _native._C
    _native._C.set_isa("portable")
    try:
        yield
    finally:
        _native.engine = saved
        _native._C.set_isa(isa)


def scalar_scores(row, score_function):
    """Scores of one row in Python floats (fp64), straight from the formula."""
    row = [-math.inf if math.isnan(z) else min(z, 3.4028234663852886e38) for z in row]
    if score_function == "sigmoid":
        return [1 / (1 + math.exp(-z)) if z > -700 else 0.0 for z in row]
    if score_function == "sqrtsoftplus":
        return [math.sqrt(max(z, 0.0) + math.log1p(math.exp(-abs(z)))) for z in row]
    peak = max(max(row), -3.4028234663852886e38)
    numerators = [math.exp(z - peak) for z in row]
    total = sum(numerators)
    return [n / total if total else 0.0 for n in numerators]


def scalar_gate(logits, k, score_function, bias, groups=1, topk_groups=1, best_of=2, scale=1.0):
    """ids and weights of one token by sorting (choice, lower id) in Python."""
    s = scalar_scores(logits, score_function)
    choice = [
        -math.inf if math.isnan(z) else v + b for z, v, b in zip(logits, s, bias, strict=True)
    ]
    size = len(s) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    group_score = [sum(sorted((choice[e] for e in m), reverse=True)[:best_of]) for m in members]
    kept = sorted(range(groups), key=lambda g: (-group_score[g], g))[:topk_groups]
    candidates = [e for g in sorted(kept) for e in members[g]]
    ids = sorted(candidates, key=lambda e: (-choice[e], e))[:k]
    total = sum(s[e] for e in ids) + 1e-20
    return ids, [s[e] / total * scale for e in ids], choice


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("experts,k", [(384, 8), (64, 6), (17, 5), (1, 1)])
def test_scalar_oracle(engine, score_function, experts, k):
    logits = hard_rows(27, experts, torch.float32)
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(1)) * 0.1
    gate = topk_gate(
        logits.to(engine.device), k, score_function=score_function,
        expert_bias=bias.to(engine.device), scaling_factor=2.827,
    )  # fmt: skip
    for t in range(len(logits)):
        ids, weights, choice = scalar_gate(
            logits[t].tolist(), k, score_function, bias.tolist(), scale=2.827
        )
        got = gate.indices[t].tolist()
        assert len(set(got)) == k and all(0 <= e < experts for e in got)
        # fp32 scores may exchange neighbours that fp64 tells apart by less than 1e-6
        for want, have in zip(ids, got, strict=True):
            assert want == have or abs(choice[want] - choice[have]) < 1e-6
        if ids == got:
            assert gate.weights[t].tolist() == pytest.approx(weights, rel=2e-6, abs=1e-18)
    counted = torch.bincount(gate.indices.flatten().cpu(), minlength=experts)
    assert torch.equal(gate.tokens_per_expert.cpu(), counted.int())


@pytest.mark.parametrize("score_function,dtype", list(itertools.product(SCORES, DTYPES)))
@pytest.mark.parametrize(
    "experts,k",
    [
        (1, 1),
        (2, 2),
        (7, 3),
        (16, 16),
        (31, 8),
        (33, 9),
        (384, 8),
        (896, 16),
        (1000, 17),
        (1024, 32),
    ],
)
def test_engines_agree_bit_for_bit(engine, score_function, dtype, experts, k):
    tokens = 27 if experts < 500 or not engine.slow else 9
    logits = hard_rows(tokens, experts, dtype, seed=experts)
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(2)) * 0.1
    grad = torch.randn(tokens, k, generator=torch.Generator().manual_seed(3))

    def run(device):
        z = logits.detach().to(device).requires_grad_()
        gate = topk_gate(
            z, k, score_function=score_function, expert_bias=bias.to(device), scaling_factor=2.5
        )
        gate.weights.backward(grad.to(device))
        return [t.detach().cpu() for t in (*gate, z.grad)]

    got = run(engine.device)
    with portable():
        want = run("cpu")
    for name, a, b in zip(("weights", "indices", "counts", "grad"), got, want, strict=True):
        assert torch.equal(bits(a), bits(b)), name


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize(
    "experts,k,groups,topk_groups,best_of",
    [
        (256, 8, 8, 4, 2),
        (256, 8, 8, 4, 1),
        (512, 32, 32, 7, 2),
        (1024, 17, 64, 5, 2),
        (1024, 32, 2, 1, 2),
        (640, 9, 80, 11, 2),  # more groups than are ranked at once
        (384, 8, 16, 4, 2),  # whole AVX2 vectors, not whole AVX-512 ones
        (96, 6, 8, 3, 2),  # no whole vectors
        (256, 8, 8, 4, 3),
        (1024, 4, 512, 3, 2),  # CUDA: more than 48 KB of shared memory
    ],
)
def test_groups_agree_bit_for_bit(engine, score_function, experts, k, groups, topk_groups, best_of):
    logits = hard_rows(27, experts, torch.float32, seed=experts)
    random = torch.Generator().manual_seed(8)
    biases = [torch.randn(experts, generator=random) * 0.1, None]
    infinite = torch.where(torch.rand(experts, generator=random) < 0.05, math.inf, 0.0)
    biases += [infinite, -infinite, infinite * torch.randn(experts, generator=random).sign()]
    biases[-1] = torch.where(infinite > 0, biases[-1], 0.0)
    for bias in biases:

        def run(device, bias=bias):
            return topk_gate(
                logits.to(device), k, score_function=score_function, num_groups=groups,
                expert_bias=None if bias is None else bias.to(device), topk_groups=topk_groups,
                group_score_topk=best_of,
            )  # fmt: skip

        got = run(engine.device)
        with portable():
            want = run("cpu")
        for name, a, b in zip(want._fields, got, want, strict=True):
            assert torch.equal(bits(a.cpu()), bits(b)), name


@pytest.mark.parametrize(
    "groups,topk_groups,best_of", [(8, 4, 2), (4, 1, 1), (2, 2, 3), (16, 3, 16)]
)
@pytest.mark.parametrize("score_function", SCORES)
def test_groups(engine, score_function, groups, topk_groups, best_of):
    experts, k = 256, 6
    logits = hard_rows(25, experts, torch.float32, seed=5)
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(6)) * 0.2
    options = dict(
        score_function=score_function, num_groups=groups, topk_groups=topk_groups,
        group_score_topk=best_of,
    )  # fmt: skip
    gate = topk_gate(logits.to(engine.device), k, expert_bias=bias.to(engine.device), **options)
    # in fp64: torch's fp32 exp was seen to err by 1e-4 on a thread's first call
    twin = reference.topk_gate(logits.double(), k, expert_bias=bias.double(), **options)
    agree = 0
    for t in range(len(logits)):
        got = gate.indices[t].tolist()
        assert len(set(got)) == k and len({e // (experts // groups) for e in got}) <= topk_groups
        ids, _, _ = scalar_gate(
            logits[t].tolist(), k, score_function, bias.tolist(), groups, topk_groups, best_of
        )
        agree += got == ids
        if got == twin[1][t].tolist():
            torch.testing.assert_close(
                gate.weights[t].cpu().double(), twin[0][t], rtol=2e-6, atol=1e-12
            )
    assert agree >= len(logits) - 3  # rows in which fp64 and fp32 order near ties differently


def test_negative_choice_scores_keep_groups_out(engine):
    """Excluded groups are excluded, not zeroed: a zero would beat the negative scores that stay."""
    logits, bias = torch.zeros(3, 8), torch.tensor([-1.0] * 4 + [-2.0] * 4)
    gate = topk_gate(
        logits.to(engine.device), 3, expert_bias=bias.to(engine.device), num_groups=2, topk_groups=1
    )
    assert gate.indices.tolist() == [[0, 1, 2]] * 3


def test_ties_take_the_lower_id(engine):
    logits = torch.zeros(2, 100)
    logits[1, [99, 3, 50]] = 1.0
    gate = topk_gate(logits.to(engine.device), 8)
    assert gate.indices.tolist() == [list(range(8)), [3, 50, 99, 0, 1, 2, 4, 5]]


def test_sigmoid_beside_zero(engine):
    """exp(-|z|) just below 1: the reciprocal's one inexact case lies here."""
    z = torch.linspace(-4e-7, 4e-7, 257).reshape(1, -1)
    gate = topk_gate(z.to(engine.device), 32, renormalize=False)
    want = torch.sigmoid(z.double())[0, gate.indices[0].long().cpu()]
    torch.testing.assert_close(gate.weights[0].double().cpu(), want, rtol=1.3e-7, atol=0)


@pytest.mark.parametrize("score_function", SCORES)
def test_adversarial_rows_take_the_slow_path(engine, score_function):
    """All large scores in one SIMD lane: the candidate bound is useless, the result must not be."""
    logits = torch.zeros(2, 1024)
    logits[0, ::64] = torch.arange(16.0)
    logits[1] = torch.arange(1024.0) % 64
    gate = topk_gate(logits.to(engine.device), 32, score_function=score_function)
    twin = reference.topk_gate(logits, 32, score_function=score_function)
    assert torch.equal(gate.indices.cpu(), twin[1])


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("experts,k", [(65, 1), (100, 32), (384, 8), (1023, 31), (1024, 32)])
def test_ties_at_the_bound(engine, score_function, experts, k):
    """More experts reach the candidate bound than are ranked: it rises, and low ids win the tie."""
    generator = torch.Generator().manual_seed(experts)
    ids = torch.arange(experts)
    rows = [
        torch.zeros(experts),
        torch.full((experts,), 60.0),  # sigmoid: saturated
        torch.randn(experts, generator=generator).round(),
        torch.where(ids % 2 == 0, -0.0, 0.0),
        torch.where(ids >= experts - k + 1, 1.0, 0.0),  # k - 1 above the tie
        torch.where(ids >= experts - k, 1.0, 0.0),  # k above it
        (ids % 64).float() / 8,  # the large ones in one lane
        torch.where(ids % 16 == 3, ids / experts + 1.0, torch.tensor(0.5)),
        torch.where(ids % 2 == 0, -math.inf, math.nan),  # all choices equal, all scores 0
    ]
    logits = torch.stack(rows)
    gate = topk_gate(logits.to(engine.device), k, score_function=score_function)
    choices = logits.nan_to_num(-math.inf, neginf=-3e38)  # a NaN behind every number
    if score_function == "sigmoid":
        choices[1] = 1.0
    for row, got in zip(choices.tolist(), gate.indices.tolist(), strict=True):
        assert got == sorted(range(experts), key=lambda e: (-row[e], e))[:k]


@pytest.mark.parametrize("bias", [0.0, 1e-4, 0.5, 30.0])
@pytest.mark.parametrize(("experts", "k"), [(64, 6), (384, 8), (896, 16), (1000, 32)])
def test_choices_as_close_as_estimates_err(engine, experts, k, bias):
    generator = torch.Generator().manual_seed(experts)
    x = torch.randn(64, experts, generator=generator) / 2 - 6
    lanes = 16 if k <= 8 else 32 if k <= 16 else 64  # a candidate in each: the tightest bound
    crowd = torch.arange(lanes) + lanes * torch.randint(
        experts // lanes, (64, lanes), generator=generator
    )
    spread = torch.logspace(-7, -2, 64)[:, None]
    middle = torch.linspace(-1, 4, 64)[torch.randperm(64, generator=generator), None]
    x.scatter_(1, crowd, middle + spread * torch.randn(crowd.shape, generator=generator))
    shift = bias * torch.randn(experts, generator=generator) if bias else None
    with portable():
        expected = topk_gate(x, k, expert_bias=shift)
    got = topk_gate(x, k, expert_bias=shift)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(bits(got.weights), bits(expected.weights))


def test_infinite_choices_tie_too(engine):
    """A bias of infinity: the raised bound may be infinite."""
    bias = torch.where(torch.arange(1024) % 2 == 0, math.inf, 0.0)
    for sign in (1, -1):
        gate = topk_gate(
            torch.zeros(1, 1024, device=engine.device),
            32,
            expert_bias=(sign * bias).to(engine.device),
        )
        first = 0 if sign == 1 else 1
        assert gate.indices[0].tolist() == list(range(first, 64, 2))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_function", SCORES)
def test_gradient_against_fp64_reference(engine, score_function, renormalize):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 60, generator=generator) * 2
    grad = torch.randn(33, 5, generator=generator)
    z = logits.clone().to(engine.device).requires_grad_()
    gate = topk_gate(
        z, 5, score_function=score_function, renormalize=renormalize, scaling_factor=2.827
    )
    gate.weights.backward(grad.to(engine.device))
    exact = logits.detach().double().requires_grad_()
    twin = reference.topk_gate(
        exact, 5, score_function, renormalize=renormalize, scaling_factor=2.827
    )
    twin[0].backward(grad.double())
    assert torch.equal(gate.indices.cpu(), twin[1])
    error = (z.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
    assert error < 5e-7


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("experts,k", [(60, 5), (33, 20), (8, 1)])
def test_gradient_leaves_out_slots_without_an_expert(
    engine, score_function, renormalize, experts, k
):
    generator = torch.Generator().manual_seed(7)
    slots = sorted({0, min(1, k - 1), k - 1})
    ids, dropped = [], []
    for bad in (-1, experts, 10**8, -(2**31)):
        for row in (*[[slot] for slot in slots], slots, range(k)):
            ids.append(torch.randperm(experts, generator=generator)[:k])
            ids[-1][list(row)] = bad
            dropped.append(list(row))
    indices = torch.stack(ids).int()
    logits = torch.randn(len(ids), experts, generator=generator) * 2
    grad_weights = torch.randn(len(ids), k, generator=generator)
    for t, row in enumerate(dropped):
        grad_weights[t, row] = math.nan  # not looked at

    def run(device):
        return torch.ops.kimi_ops.topk_gate_backward(
            grad_weights.to(device), logits.to(device), indices.to(device), score_function,
            renormalize, 2.827,
        ).cpu()  # fmt: skip

    got = run(engine.device)
    with portable():
        assert torch.equal(bits(got), bits(run("cpu")))
    for t, row in enumerate(dropped):
        kept = [j for j in range(k) if j not in row]
        z = logits[t].double().requires_grad_()
        s = {
            "sigmoid": torch.sigmoid,
            "softmax": lambda z: torch.softmax(z, -1),
            "sqrtsoftplus": lambda z: torch.log1p(z.exp()).sqrt(),
        }[score_function](z)
        u = s[indices[t, kept].long()]
        weights = (u / u.sum() if renormalize else u) * 2.827
        (want,) = torch.autograd.grad((weights * grad_weights[t, kept]).sum(), z)
        torch.testing.assert_close(got[t].double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("score_function", SCORES)
def test_reference_gradcheck(score_function):
    z = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)

    def weights(z):
        return reference.topk_gate(z, 4, score_function, scaling_factor=2.0)[0]

    assert torch.autograd.gradcheck(weights, (z,))


def test_valid_drops_tokens(engine):
    logits = torch.randn(21, 40)
    valid = torch.arange(21) % 3 != 0
    z = logits.clone().to(engine.device).requires_grad_()
    gate = topk_gate(z, 4, valid=valid.to(engine.device))
    gate.weights.sum().backward()
    alone = topk_gate(logits[valid].to(engine.device), 4)
    assert torch.equal(gate.indices[valid], alone.indices)
    assert torch.equal(gate.weights[valid], alone.weights)
    assert torch.equal(gate.tokens_per_expert, alone.tokens_per_expert)
    assert (gate.indices[~valid] == -1).all() and (gate.weights[~valid] == 0).all()
    assert (z.grad[~valid] == 0).all()


def test_empty(engine):
    z = torch.zeros(0, 384, device=engine.device, requires_grad=True)
    gate = topk_gate(z, 8)
    assert gate.weights.shape == (0, 8) and not gate.tokens_per_expert.any()
    gate.weights.sum().backward()
    assert z.grad.shape == (0, 384)


def test_strided_logits_and_gradients(engine):
    wide = torch.randn(19, 200).to(engine.device)
    for view in (wide[:, 30:94], wide.t()[:64].t(), wide[::2, :64]):
        dense = view.clone().requires_grad_()
        strided = view.detach().requires_grad_()
        a, b = topk_gate(strided, 5), topk_gate(dense, 5)
        assert torch.equal(a.weights, b.weights) and torch.equal(a.indices, b.indices)
        grad = torch.randn(5, len(view)).to(engine.device).t()  # not contiguous
        (ga,) = torch.autograd.grad(a.weights, strided, grad)
        (gb,) = torch.autograd.grad(b.weights, dense, grad.contiguous())
        assert torch.equal(ga, gb)


@pytest.mark.parametrize("score_function", SCORES)
def test_repeats_and_threads_give_the_same_bits(engine, two_thread_counts, score_function):
    tokens = 64 if engine.slow else 700
    logits = hard_rows(tokens, 96, torch.float32).to(engine.device)
    first = None
    for threads in (*two_thread_counts, *[two_thread_counts[1]] * 18):
        torch.set_num_threads(threads)
        gate = topk_gate(logits, 8, score_function=score_function)
        first = first or gate
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(gate, first, strict=True))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape_matches_the_twin(engine, data):
    experts = data.draw(st.integers(1, 80), label="E")
    k = data.draw(st.integers(1, min(experts, 32)), label="K")
    tokens = data.draw(st.integers(0, 6 if engine.slow else 40), label="T")
    # halves: exact ties abound, and fp32 and torch order them alike
    values = st.integers(-8, 8)
    rows = data.draw(st.lists(values, min_size=experts, max_size=experts), label="row")
    logits = torch.tensor([rows] * tokens).float().reshape(tokens, experts) * 0.5
    if tokens:
        logits += torch.arange(tokens)[:, None] % 3
    gate = topk_gate(logits.to(engine.device), k)
    twin = reference.topk_gate(logits, k)
    assert torch.equal(gate.indices.cpu(), twin[1])
    torch.testing.assert_close(gate.weights.cpu(), twin[0], rtol=2e-6, atol=0)
    assert torch.equal(gate.tokens_per_expert.cpu(), twin[2])
