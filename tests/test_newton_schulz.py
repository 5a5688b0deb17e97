# SPDX-License-Identifier: MIT
"""newton_schulz against exact mathematics: singular vectors stay, singular values go through the
polynomials."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_ops.newton_schulz import newton_schulz, schedule
from kimi_ops.reference.newton_schulz import FIXED_SCHEDULES, SCHEDULES

SHAPES = [(1, 1), (1, 9), (7, 2), (16, 16), (33, 129), (129, 33), (64, 200)]
# Image of singular values in [3e-3, 1] of the Frobenius norm, in exact arithmetic.
BANDS = {
    "quintic": (0.682, 1.203),
    "you": (0.977, 1.146),
    "polar_express": (0.846, 1.125),
    "cans": (0.866, 1.114),
    "deepseek_v4": (0.999, 1.002),
    "cubic": (0.352, 1.301),
}


def steps_of(name: str) -> int:
    return len(FIXED_SCHEDULES.get(name, range(5)))


def known_matrix(m: int, n: int, spectrum: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """G = U diag(s) V^T in fp64, with its factors."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    u = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=generator))[0]
    return u @ torch.diag(spectrum) @ v.T, u, v


def through_polynomials(s: torch.Tensor, rows: tuple) -> torch.Tensor:
    s = s / s.norm()
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return s


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.double() - ref).norm() / ref.norm())


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_scalar_polynomial_oracle(name: str, shape: tuple, dtype: torch.dtype, bound: float):
    m, n = shape
    if name in ("cans", "polar_express"):
        bound *= 10 if dtype == torch.float32 else 2  # steep at 1: |p'| is 26 in their first step
    spectrum = 1.0 / torch.arange(1, min(m, n) + 1, dtype=torch.float64)
    g, u, v = known_matrix(m, n, spectrum, seed=m * 1000 + n)
    expected = u @ torch.diag(through_polynomials(spectrum, schedule(name, steps_of(name)))) @ v.T
    out = newton_schulz(g, steps=steps_of(name), coefficients=name, dtype=dtype)
    assert out.dtype == g.dtype and out.shape == g.shape
    assert relative(out, expected) < bound


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_singular_values_land_in_the_band_of_the_schedule(name: str):
    spectrum = torch.logspace(-2.3, 0, 48, dtype=torch.float64)
    spectrum = spectrum / spectrum.norm()
    spectrum = spectrum[spectrum >= 3e-3]
    g, _, _ = known_matrix(len(spectrum), 80, spectrum, seed=3)
    out = newton_schulz(g, steps=steps_of(name), coefficients=name, dtype=torch.float64)
    values = torch.linalg.svdvals(out)
    low, high = BANDS[name]
    assert low <= values.min() and values.max() <= high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_equals_singles_and_tall_equals_wide(dtype: torch.dtype):
    g = torch.randn(2, 3, 40, 72, generator=torch.Generator().manual_seed(0))
    out = newton_schulz(g, dtype=dtype)
    for i in range(2):
        for j in range(3):
            assert torch.equal(out[i, j], newton_schulz(g[i, j].clone(), dtype=dtype))
    assert torch.equal(newton_schulz(g.mT, dtype=dtype), out.mT)
    assert torch.equal(newton_schulz(g.flip(0), dtype=dtype), out.flip(0))


@settings(max_examples=30, deadline=None)
@given(
    m=st.sampled_from([1, 2, 7, 30, 129]),
    n=st.sampled_from([1, 3, 64, 200]),
    power=st.integers(-90, 90),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_a_power_of_two_changes_no_bit(m: int, n: int, power: int, dtype: torch.dtype):
    g = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    assert torch.equal(newton_schulz(g * 2.0**power, dtype=dtype), newton_schulz(g, dtype=dtype))


def test_zero_tiny_huge_and_empty():
    g = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    g[1] = 0
    out = newton_schulz(g)
    assert torch.equal(out[1], torch.zeros(8, 12))
    assert torch.isfinite(out).all() and torch.linalg.svdvals(out[0].double()).min() > 0.5
    for size in (1e-38, 1e38):
        values = torch.linalg.svdvals(newton_schulz(torch.eye(6) * size).double())
        assert values.min() > 0.6 and values.max() < 1.25
    assert newton_schulz(torch.zeros(0, 4, 5)).shape == (0, 4, 5)
    assert newton_schulz(torch.zeros(4, 0)).shape == (4, 0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_rank_one_in_bf16_does_not_diverge(name: str):
    """Its one singular value is exactly 1, the edge of every schedule's basin."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(9, 1, generator=generator) @ torch.randn(1, 30, generator=generator)
        out = newton_schulz(g, steps=steps_of(name), coefficients=name)
        assert 0.6 < float(torch.linalg.matrix_norm(out.double(), 2)) < 1.35


def test_a_nan_stays_in_its_own_matrix():
    g = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    g[0, 0, 0] = float("nan")
    out = newton_schulz(g)
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1]).all()


def test_padding_with_zeros_is_exact():
    g = torch.randn(10, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    padded = torch.zeros(16, 32, dtype=torch.float64)
    padded[:10, :20] = g
    out = newton_schulz(padded, dtype=torch.float64)
    assert torch.equal(out[10:], torch.zeros(6, 32, dtype=torch.float64))
    assert relative(out[:10, :20], newton_schulz(g, dtype=torch.float64)) < 1e-12


def test_eps_bounds_the_norm_from_below():
    g = torch.eye(4) * 1e-9
    exact = newton_schulz(g, dtype=torch.float32)
    bounded = newton_schulz(g, dtype=torch.float32, eps=1e-7)
    # norm 2e-9 < 1e-7: the singular values start at 1e-2 instead of 1/2
    expected = through_polynomials(torch.tensor([0.5]), ())  # the unit vector of one value
    assert expected == 1.0
    start = torch.tensor(1e-9 / 1e-7, dtype=torch.float64)
    for a, b, c in schedule("quintic", 5):
        start = a * start + b * start**3 + c * start**5
    assert torch.allclose(bounded, torch.eye(4) * float(start), atol=1e-5)
    assert not torch.allclose(exact, bounded, atol=1e-2)


def test_custom_schedules():
    g = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    triple = (3.4445, -4.775, 2.0315)
    base = newton_schulz(g, dtype=torch.float64)
    assert torch.equal(base, newton_schulz(g, coefficients=triple, dtype=torch.float64))
    rows = [triple] * 5
    assert torch.equal(base, newton_schulz(g, coefficients=rows, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"coefficients": "septic"}, "coefficients: expected one of"),
        ({"coefficients": [(1.0, 2.0)]}, "triple"),
        ({"coefficients": [(1.0, 2.0, 3.0)] * 2}, "pass steps=2"),
        ({"coefficients": "deepseek_v4"}, "pass steps=10"),
        ({"steps": 0}, "1 to 99"),
        ({"method": "gram"}, "served are 'auto', 'standard'"),
        ({"restarts": (3,)}, "restarts"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_refuses_what_nothing_serves(arguments: dict, text: str):
    with pytest.raises(ValueError, match=text):
        newton_schulz(torch.ones(2, 2), **arguments)


def test_refuses_wrong_tensors():
    with pytest.raises(ValueError, match=r"\[..., m, n\]"):
        newton_schulz(torch.ones(3))
    with pytest.raises(TypeError, match="int64"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="complex"):
        newton_schulz(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="dtype"):
        newton_schulz(torch.ones(2, 2), dtype=torch.int32)
    with pytest.raises(TypeError, match="steps"):
        newton_schulz(torch.ones(2, 2), steps=5.0)
