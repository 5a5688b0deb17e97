# SPDX-License-Identifier: MIT
"""Bias rule and losses against scalar fp64 arithmetic and the torch twin, on every engine."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_ops import _native, sequence_balance_loss, topk_gate, update_expert_bias_, z_loss
from kimi_ops.reference import balance as reference

SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX = 3.4028234663852886e38
SIZES = [(1, 1), (2, 2), (7, 3), (31, 8), (33, 9), (65, 4), (384, 8), (896, 16), (1000, 17)]


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def rows(tokens, experts, dtype=torch.float32, seed=0, hard=False):
    """Normal logits; `hard`: NaN, infinities, zeros and saturated values among the rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, experts, generator=generator) * 3
    if hard and tokens:
        even = torch.arange(experts) % 2 == 0
        specials = [
            torch.full((experts,), math.nan), torch.full((experts,), -200.0), torch.zeros(experts),
            torch.where(even, math.nan, x[0]), torch.full((experts,), 90.0),
            torch.where(even, -math.inf, x[0]), x[0] * 1e-7,
        ]  # fmt: skip
        for row, special in zip(range(1, tokens, 2), specials, strict=False):
            x[row] = special
    return x.to(dtype)


def ids(tokens, experts, k, seed=1):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k].int()
    return chosen.masked_fill(torch.rand(tokens, k, generator=generator) < 0.1, -1)


def portable(function):
    """What `function` gives on the portable engine."""
    saved, isa = _native.engine, _native._C.current_isa()
    _native.engine = _native._C
    _native._C.set_isa("portable")
    try:
        return function()
    finally:
        _native.engine = saved
        _native._C.set_isa(isa)


def relative(got, want):
    return ((got.double().cpu() - want).norm() / want.norm()).item()


# ---- update_expert_bias_ ------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [1, 2, 31, 384, 1500])
def test_bias_rule_in_exact_fractions(engine, experts, dtype, centered):
    generator = torch.Generator().manual_seed(experts)
    loads = torch.randint(0, 9, (experts,), generator=generator, dtype=dtype)
    bias = torch.randn(experts, generator=generator)
    before = bias.tolist()
    got = update_expert_bias_(bias.to(engine.device), loads.to(engine.device), 0.001, centered)
    mean = Fraction(int(loads.sum()), experts)
    directions = [(mean > n) - (mean < n) for n in loads.tolist()]
    drift = Fraction(sum(directions), experts) if centered else 0
    for old, new, d in zip(before, got.tolist(), directions, strict=True):
        assert new == pytest.approx(old + 0.001 * float(d - drift), rel=1.3e-7, abs=2e-10)
        assert centered or d or new == old


def test_bias_rule_counts_exactly(engine):
    """Loads that fp32 and fp64 cannot tell from their mean."""
    loads = torch.tensor([2**52 + 1, 2**52, 2**52 - 1, 2**52], device=engine.device)
    bias = update_expert_bias_(torch.zeros(4, device=engine.device), loads, 1.0)
    assert bias.tolist() == [-1.0, 0.0, 1.0, 0.0]


def test_bias_is_moved_in_place_through_strides(engine):
    table = torch.zeros(4, 3, device=engine.device)
    column, loads = table[:, 1], torch.tensor([5, 0, 1, 0, 1, 9, 2, 7], device=engine.device)
    version = table._version
    assert update_expert_bias_(column, loads[::2], 0.5) is column
    assert table[:, 1].tolist() == [-0.5, 0.5, 0.5, 0.5] and not table[:, [0, 2]].any()
    assert table._version > version
    dense = torch.zeros(2, device=engine.device)
    version = dense._version
    update_expert_bias_(dense, loads[:2], 0.5)
    assert dense._version > version


def test_bias_of_no_experts(engine):
    empty = torch.zeros(0, device=engine.device)
    assert update_expert_bias_(empty, empty.int(), 0.1).shape == (0,)


# ---- sequence_balance_loss ----------------------------------------------------------------------


def scalar_balance_loss(logits, indices, sequences, score_function, coefficient):
    """DeepSeek-V3's eq. 17-20 in Python floats."""

    def score(row):
        row = [-math.inf if math.isnan(z) else min(z, MAX) for z in row]
        if score_function == "sigmoid":
            return [1 / (1 + math.exp(-z)) if z > -700 else 0.0 for z in row]
        if score_function == "sqrtsoftplus":
            return [math.sqrt(max(z, 0.0) + math.log1p(math.exp(-abs(z)))) for z in row]
        peak = max(max(row), -MAX)
        total = sum(math.exp(z - peak) for z in row)
        return [math.exp(z - peak) / total if total else 0.0 for z in row]

    tokens, experts = logits.shape
    length, k, loss = tokens // sequences, indices.shape[1], 0.0
    for n in range(sequences):
        chosen = indices[n * length : (n + 1) * length].flatten().tolist()
        f = [chosen.count(e) * experts / (k * length) for e in range(experts)]
        p = [0.0] * experts
        for row in logits[n * length : (n + 1) * length].tolist():
            s = score(row)
            total = sum(s) + 1e-20
            p = [a + b / total / length for a, b in zip(p, s, strict=True)]
        loss += coefficient * sum(a * b for a, b in zip(f, p, strict=True))
    return loss / sequences


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("sequences,length,experts,k", [(1, 70, 20, 4), (3, 7, 5, 5), (2, 1, 1, 1)])
def test_loss_in_scalar_arithmetic(engine, score_function, sequences, length, experts, k):
    logits, indices = rows(sequences * length, experts), ids(sequences * length, experts, k)
    loss = sequence_balance_loss(
        logits.to(engine.device), indices.to(engine.device), num_sequences=sequences,
        score_function=score_function, coefficient=0.7,
    )  # fmt: skip
    want = scalar_balance_loss(logits, indices, sequences, score_function, 0.7)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want, rel=1e-6)


def test_a_row_without_scores_has_no_shares(engine):
    logits = rows(5, 12)
    logits[2], logits[3] = math.nan, -math.inf
    indices = ids(5, 12, 3)
    z = logits.clone().to(engine.device).requires_grad_()
    loss = sequence_balance_loss(z, indices.to(engine.device), coefficient=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(scalar_balance_loss(logits, indices, 1, "sigmoid", 1.0))
    assert not z.grad[2:4].any() and z.grad[[0, 1, 4]].all()


@pytest.mark.parametrize("score_function", SCORES)
@pytest.mark.parametrize("tokens,sequences", [(200, 1), (130, 2), (12, 12)])
def test_loss_and_gradient_against_fp64_twin(engine, score_function, tokens, sequences):
    logits, indices = rows(tokens, 60), ids(tokens, 60, 5)
    options = dict(num_sequences=sequences, score_function=score_function, coefficient=2.0)
    z = logits.clone().to(engine.device).requires_grad_()
    loss = sequence_balance_loss(z, indices.to(engine.device), **options)
    (loss * 3).backward()
    exact = logits.double().requires_grad_()
    want = reference.sequence_balance_loss(exact, indices, **options)
    (want * 3).backward()
    assert loss.item() == pytest.approx(want.item(), rel=5e-7)
    assert relative(z.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_function", SCORES)
def test_balance_loss_bit_for_bit(engine, score_function, dtype):
    for experts, k in SIZES:
        for tokens, sequences in [(1, 1), (27, 3), (129, 1), (260, 4)]:
            if engine.slow and tokens * experts > 30_000:
                continue
            logits = rows(tokens, experts, dtype, seed=experts, hard=True)
            indices = ids(tokens, experts, k)

            def run(device, logits=logits, indices=indices, sequences=sequences):
                z = logits.detach().to(device).requires_grad_()
                loss = sequence_balance_loss(
                    z, indices.to(device), num_sequences=sequences,
                    score_function=score_function, coefficient=0.5,
                )  # fmt: skip
                (loss * 1000).backward()
                return loss.detach().cpu(), z.grad.cpu()

            (loss, grad), (want, want_grad) = run(engine.device), portable(lambda: run("cpu"))
            assert torch.equal(bits(loss), bits(want)), (experts, tokens, sequences)
            assert torch.equal(bits(grad), bits(want_grad)), (experts, tokens, sequences)


def test_ids_out_of_range_count_for_none(engine):
    logits = rows(9, 6).to(engine.device)
    indices = ids(9, 6, 3).to(engine.device)
    indices[:, 0] = -1
    other = indices.clone()
    other[:, 0] = torch.tensor([6, 7, -2, 2**31 - 1, -(2**31), 6, 6, 6, 100], device=other.device)
    assert torch.equal(sequence_balance_loss(logits, indices), sequence_balance_loss(logits, other))


# ---- z_loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 33, 384])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 1e6])
def test_z_loss_in_scalar_arithmetic(engine, experts, scale):
    logits = rows(70, experts) * scale
    squares = []
    for row in logits.tolist():
        peak = max(row)
        squares.append((peak + math.log(sum(math.exp(z - peak) for z in row))) ** 2)
    loss = z_loss(logits.to(engine.device), coefficient=0.5)
    assert loss.item() == pytest.approx(0.5 * sum(squares) / 70, rel=1e-6)


def test_logarithm_is_accurate(engine):
    """E equal logits of 0: lse = log E; every E exercises another argument of the logarithm."""
    step = 37 if engine.slow else 1
    for experts in range(2, 1025, step):
        row = torch.zeros(1, experts, device=engine.device)
        _, lse, _ = torch.ops.kimi_ops.z_loss_forward(row, 1.0, None)
        want = math.log(experts)
        ulp = 2.0 ** (math.floor(math.log2(want)) - 23)
        assert abs(lse.item() - want) <= ulp, experts


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_z_gradient_against_fp64_twin(engine, tokens):
    logits = rows(tokens, 60)
    valid = torch.arange(tokens) % 3 != 1
    z = logits.clone().to(engine.device).requires_grad_()
    loss = z_loss(z, coefficient=0.1, valid=valid.to(engine.device))
    (loss * 3).backward()
    exact = logits.double().requires_grad_()
    want = reference.z_loss(exact, 0.1, valid)
    (want * 3).backward()
    assert loss.item() == pytest.approx(want.item(), rel=5e-7)
    assert relative(z.grad, exact.grad) < 1e-6
    assert not z.grad[~valid.to(z.device)].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_z_loss_bit_for_bit(engine, dtype):
    for experts, _ in SIZES:
        for tokens in (1, 27, 130):
            if engine.slow and tokens * experts > 30_000:
                continue
            logits = rows(tokens, experts, dtype, seed=experts, hard=True)
            logits[~logits.float().isfinite().any(dim=1)] = 0.25  # their loss is inf
            valid = torch.arange(tokens) % 5 != 4

            def run(device, mask, logits=logits):
                z = logits.detach().to(device).requires_grad_()
                loss = z_loss(z, valid=None if mask is None else mask.to(device))
                (loss * 1000).backward()
                return loss.detach().cpu(), z.grad.cpu()

            for mask in (None, valid):
                loss, grad = run(engine.device, mask)
                want, want_grad = portable(lambda mask=mask, run=run: run("cpu", mask))
                assert torch.equal(bits(loss), bits(want)), (experts, tokens)
                assert torch.equal(bits(grad), bits(want_grad)), (experts, tokens)


def test_z_loss_of_nan_and_infinities(engine):
    logits = rows(4, 10)
    logits[1, ::2], logits[2, 3] = math.nan, -math.inf
    clean = logits.nan_to_num(nan=-math.inf, neginf=-math.inf)
    got, want = z_loss(logits.to(engine.device)), z_loss(clean.to(engine.device))
    assert torch.equal(got, want) and got.isfinite()
    for bad in (-math.inf, math.nan):
        logits[3] = bad
        z = logits.clone().to(engine.device).requires_grad_()
        loss = z_loss(z)
        loss.backward()
        assert loss.item() == math.inf and not z.grad[3].any() and z.grad[0].all()
    logits[3], logits[3, 5] = 0.0, math.inf
    z = logits.clone().to(engine.device).requires_grad_()
    loss = z_loss(z, coefficient=0.1)
    loss.backward()
    assert loss.item() == math.inf  # the largest finite number, squared
    want = torch.zeros(10)
    want[5] = 0.2 / 4 * MAX
    torch.testing.assert_close(z.grad[3].cpu(), want)


def test_invalid_tokens_are_as_if_absent(engine):
    """Also in their values: NaN there does not spread."""
    logits = rows(100, 17)
    valid = torch.arange(100) < 64
    logits[~valid] = math.nan
    some = z_loss(logits.to(engine.device), valid=valid.to(engine.device))
    assert torch.equal(some, z_loss(logits[:64].to(engine.device)))
    none = torch.zeros(100, dtype=torch.bool, device=engine.device)
    z = logits.to(engine.device).requires_grad_()
    loss = z_loss(z, valid=none)
    loss.backward()
    assert loss.item() == 0.0 and not z.grad.any()


# ---- both losses --------------------------------------------------------------------------------


def both(z, indices, **options):
    return sequence_balance_loss(z, indices, coefficient=1.0, **options) + z_loss(z)


@pytest.mark.parametrize("score_function", SCORES)
def test_reference_gradcheck(score_function):
    z, indices = rows(6, 10).double().requires_grad_(), ids(6, 10, 4)
    valid = torch.arange(6) > 1
    assert torch.autograd.gradcheck(
        lambda z: reference.sequence_balance_loss(z, indices, 2, score_function, 1.0), (z,)
    )
    assert torch.autograd.gradcheck(lambda z: reference.z_loss(z, 0.5, valid), (z,))


def test_empty(engine):
    z = torch.zeros(0, 384, device=engine.device, requires_grad=True)
    indices = torch.zeros(0, 8, dtype=torch.int32, device=engine.device)
    for sequences in (1, 3):
        loss = both(z, indices, num_sequences=sequences)
        loss.backward()
        assert loss.item() == 0.0 and z.grad.shape == (0, 384)


def test_strided_logits_and_expanded_gradient(engine):
    wide = torch.randn(19, 200).to(engine.device)
    indices = ids(19, 64, 5).to(engine.device)
    columns = indices.t().contiguous().t()
    for view in (wide[:, 30:94], wide.t()[:64].t(), wide[:, :64]):
        dense, strided = view.clone().requires_grad_(), view.detach().requires_grad_()
        a, b = both(strided, columns), both(dense, indices)
        assert torch.equal(a, b)
        a.expand(3).sum().backward()
        (3 * b).backward()
        assert torch.equal(strided.grad, dense.grad)


def test_repeats_and_threads_give_the_same_bits(engine, two_thread_counts):
    tokens = 130 if engine.slow else 1500
    logits, indices = rows(tokens, 96, hard=True), ids(tokens, 96, 8)
    logits[~logits.isfinite().any(dim=1)] = 0.0
    logits, indices = logits.to(engine.device), indices.to(engine.device)
    first = None
    for threads in (*two_thread_counts, *[two_thread_counts[1]] * 18):
        torch.set_num_threads(threads)
        z = logits.clone().requires_grad_()
        loss = both(z, indices, num_sequences=2)
        loss.backward()
        first = first or (loss, z.grad)
        assert torch.equal(bits(loss), bits(first[0])) and torch.equal(bits(z.grad), bits(first[1]))


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape_matches_the_twin(engine, data):
    experts = data.draw(st.integers(1, 80), label="E")
    k = data.draw(st.integers(1, min(experts, 8)), label="K")
    sequences = data.draw(st.integers(1, 4), label="N")
    length = data.draw(st.integers(1, 20 if engine.slow else 150), label="S")
    function = data.draw(st.sampled_from(SCORES))
    logits = rows(sequences * length, experts, seed=data.draw(st.integers(0, 9)))
    indices = ids(sequences * length, experts, k)
    z = logits.clone().to(engine.device).requires_grad_()
    loss = both(z, indices.to(engine.device), num_sequences=sequences, score_function=function)
    loss.backward()
    exact = logits.double().requires_grad_()
    want = reference.sequence_balance_loss(exact, indices, sequences, function, 1.0)
    want = want + reference.z_loss(exact)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(z.grad.cpu().double(), exact.grad, rtol=1e-4, atol=2e-7)


def test_follows_the_gate(engine):
    """Uniform scores and all experts chosen: f = P E = 1, so the loss is its coefficient."""
    logits = torch.zeros(130, 24, device=engine.device)
    gate = topk_gate(logits, 24)
    loss = sequence_balance_loss(logits, gate.indices, num_sequences=2, coefficient=0.25)
    assert loss.item() == pytest.approx(0.25, rel=1e-6)
