# SPDX-License-Identifier: MIT
"""newton_schulz against exact mathematics: singular vectors stay, singular values go through the
polynomials."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import known_matrix, randn, relative, through_polynomials

from kimi_ops import newton_schulz, symmetric_matmul, syrk
from kimi_ops.optim import engine as seam
from kimi_ops.optim.ns_schedule import (
    FIXED_SCHEDULES,
    METHODS,
    SCHEDULES,
    ns_flops,
    schedule,
    tune_ns_restarts,
)

SHAPES = [(1, 1), (1, 9), (7, 2), (16, 16), (33, 129), (129, 33), (64, 200)]
ARITHMETIC = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Relative Frobenius error of the image of 1 / i in units of the dtype, on top of what one rounding
# of the input costs under the polynomials themselves.
UNITS = {
    ("standard", torch.float64): 200,
    ("standard", torch.float32): 24,
    ("standard", torch.float16): 4,
    ("standard", torch.bfloat16): 4,
    ("gram", torch.float64): 200,
    ("gram", torch.float32): 200,
    ("gram", torch.float16): 25,
    ("gram", torch.bfloat16): 30,
}
# Image of singular values in [3e-3, 1] of the Frobenius norm, in exact arithmetic.
BANDS = {
    "quintic": (0.682, 1.203),
    "you": (0.977, 1.146),
    "polar_express": (0.846, 1.125),
    "cans": (0.866, 1.114),
    "deepseek_v4": (0.999, 1.002),
    "cubic": (0.352, 1.301),
}
SLACK = {torch.float64: 0.0, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.1}


def steps_of(name: str) -> int:
    return len(FIXED_SCHEDULES.get(name, range(5)))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
def test_scalar_polynomial_oracle(name: str, method: str, dtype: torch.dtype):
    rows = schedule(name, steps_of(name))
    for m, n in SHAPES:
        spectrum = 1.0 / torch.arange(1, min(m, n) + 1, dtype=torch.float64)
        g, u, v = known_matrix(m, n, spectrum, seed=m * 1000 + n)
        image = through_polynomials(spectrum, rows)
        moved = through_polynomials(spectrum, rows, scale=1 + 1e-7) - image
        amplified = float(moved.norm() / image.norm() / 1e-7)
        if min(m, n) == 1:  # a rounding above 1 leaves the range the steep schedules are made for
            amplified *= 8
        units = UNITS["gram" if method == "gram" else "standard", dtype] + amplified
        out = newton_schulz(g, steps=len(rows), coefficients=name, method=method, dtype=dtype)
        assert out.dtype == g.dtype and out.shape == g.shape
        error = relative(out, u @ torch.diag(image) @ v.T)
        assert error < units * torch.finfo(dtype).eps, (m, n)


SPECTRA = {
    "logarithmic": torch.logspace(0, -4, 96, dtype=torch.float64),
    "rank 3 and noise": torch.cat([torch.ones(3), torch.full((93,), 1e-6)]).double(),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(95)]).double(),
    "equal": torch.ones(96, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gram_is_as_exact_as_the_standard_form(name: str, spectrum: str, dtype: torch.dtype):
    """On spectra where rounding is amplified in any form; within a factor that its own products
    cost."""
    s = SPECTRA[spectrum]
    g, u, v = known_matrix(96, 336, s, seed=5)
    image = u @ torch.diag(through_polynomials(s, schedule(name, steps_of(name)))) @ v.T
    options = {"steps": steps_of(name), "coefficients": name, "dtype": dtype}
    error = {m: relative(newton_schulz(g, method=m, **options), image) for m in METHODS}
    floor = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    steep = 14 if dtype == torch.float32 else 4
    assert error["symmetric"] <= 1.25 * error["standard"] + floor / 100
    assert error["gram"] <= max(steep * error["standard"], floor)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
def test_singular_values_land_in_the_band_of_the_schedule(
    name: str, method: str, dtype: torch.dtype
):
    spectrum = torch.logspace(-2.3, 0, 48, dtype=torch.float64)
    spectrum = spectrum / spectrum.norm()
    spectrum = spectrum[spectrum >= 3e-3]
    g, _, _ = known_matrix(len(spectrum), 80, spectrum, seed=3)
    out = newton_schulz(g, steps=steps_of(name), coefficients=name, method=method, dtype=dtype)
    values = torch.linalg.svdvals(out)
    low, high = BANDS[name]
    slack = SLACK[dtype] * (5 if method == "gram" else 1)
    assert low - slack <= values.min() and values.max() <= high + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_keeps_its_bits_in_any_company_and_layout(dtype: torch.dtype, method: str):
    g = randn(2, 3, 40, 72)
    options = {"dtype": dtype, "method": method}
    out = newton_schulz(g, **options)
    singles = [newton_schulz(g[i, j].clone(), **options) for i in range(2) for j in range(3)]
    assert torch.equal(out.flatten(0, 1), torch.stack(singles))
    for tall in (g.mT, g.mT.contiguous()):
        assert torch.equal(newton_schulz(tall, **options), out.mT)
    square = g[0, 0, :, :40]  # its own m x n form: by strides, not by orientation
    turned = square.mT.contiguous().mT
    assert torch.equal(newton_schulz(turned, **options), newton_schulz(square, **options))
    slack = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-3}[dtype]
    far = newton_schulz(square.mT, **options).mT - newton_schulz(square, **options)
    assert far.norm() < slack * square.shape[0] ** 0.5
    assert torch.equal(newton_schulz(g.flip(0), **options), out.flip(0))
    assert torch.equal(newton_schulz(g, **options), out)  # run to run
    mixed = [g[0], randn(5, 4, seed=1), g[1, 2].T, g.mT[:, 1:].mT]
    images = newton_schulz(mixed, **options)
    assert [image.shape for image in images] == [x.shape for x in mixed]
    assert torch.equal(images[0], out[0]) and torch.equal(images[2], out[1, 2].T)
    assert torch.equal(images[1], newton_schulz(mixed[1], **options))
    assert newton_schulz([], **options) == []


@settings(max_examples=60, deadline=None)
@given(
    m=st.sampled_from([1, 2, 7, 30, 129, 576]),
    n=st.sampled_from([1, 3, 64, 200]),
    power=st.integers(-90, 90),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    method=st.sampled_from(("auto", *METHODS)),
)
def test_a_power_of_two_changes_no_bit(m: int, n: int, power: int, dtype: torch.dtype, method: str):
    g = randn(m, n, seed=m * n)
    options = {"dtype": dtype, "method": method}
    out = newton_schulz(g, **options)
    assert torch.equal(newton_schulz(g * 2.0**power, **options), out)
    assert torch.equal(newton_schulz(g.T, **options), out.T)
    assert torch.linalg.matrix_norm(out.double(), 2) < 1.35


@settings(max_examples=60, deadline=None)
@given(
    m=st.sampled_from([1, 2, 7, 129, 576]),
    k=st.sampled_from([1, 5, 64, 333]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    batch=st.sampled_from([(), (3,)]),
)
def test_symmetric_products_are_symmetric_and_right(
    m: int, k: int, dtype: torch.dtype, batch: tuple
):
    a = randn(*batch, m, k, seed=m + k, dtype=dtype) / k**0.5
    c = randn(*batch, m, m, seed=m * k, dtype=dtype)
    garbage_above = c.tril() + torch.full_like(c, float("nan")).triu(1)
    c = c.tril() + c.tril(-1).mT
    out = syrk(a, c=garbage_above, alpha=2.0, beta=-0.5)
    exact = 2 * a.double() @ a.double().mT - 0.5 * c.double()
    unit = torch.finfo(dtype).eps * (2 + max(m, k) ** 0.5 if dtype.itemsize > 2 else 1)
    terms = 2 * a.double().abs() @ a.double().abs().mT + 0.5 * c.double().abs()
    assert torch.equal(out, out.mT) and ((out - exact).abs() <= unit * terms).all()
    square = symmetric_matmul(out, out, c=out, beta=3.0)
    exact = out.double() @ out.double() + 3 * out.double()
    terms = out.double().abs() @ out.double().abs() + 3 * out.double().abs()
    assert torch.equal(square, square.mT) and ((square - exact).abs() <= unit * terms).all()
    if batch:
        assert torch.equal(syrk(a)[1], syrk(a[1])) and syrk(a[:0]).shape == (0, m, m)


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


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e200, 1e308])
def test_extremes_of_fp64(size: float):
    values = torch.linalg.svdvals(newton_schulz(torch.eye(6, dtype=torch.float64) * size))
    assert values.min() > 0.6 and values.max() < 1.25


def test_one_huge_row_hides_nothing_from_the_rest():
    g = randn(20, 30, dtype=torch.float64)
    g[3] *= 1e3
    image = newton_schulz(g, dtype=torch.float64, steps=40, coefficients=[(1.5, -0.5, 0.0)] * 40)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert relative(image, u @ v) < 1e-9  # the slow iteration that converges to the polar factor


def test_small_rows_do_not_fall_out_of_fp16():
    """Beside rows 2^10 times as large their entries are 2e-6 of the norm; fp16 ends at 6e-5."""
    g = randn(128, 1024, dtype=torch.float64)
    g[64:] *= 2.0**-10
    for method in METHODS:
        options = {"method": method, "coefficients": "polar_express"}
        out = newton_schulz(g, dtype=torch.float16, **options)
        exact = newton_schulz(g, dtype=torch.float64, **options)
        assert relative(out[64:], exact[64:]) < 2e-3, method


def test_the_input_is_not_written():
    for dtype in (torch.float32, torch.bfloat16):
        g = randn(6, 4, dtype=dtype)
        before = g.clone()
        out = newton_schulz(g, dtype=dtype)
        assert torch.equal(g, before) and out.data_ptr() != g.data_ptr()
        assert not newton_schulz(g.requires_grad_(), dtype=dtype).requires_grad


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_rank_one_in_bf16_does_not_diverge(name: str):
    """Its one singular value is exactly 1, the edge of every schedule's basin."""
    for seed in range(40):
        g = randn(9, 1, seed=seed) @ randn(1, 30, seed=seed + 100)
        for method in METHODS:
            out = newton_schulz(
                g, steps=steps_of(name), coefficients=name, method=method, dtype=torch.bfloat16
            )
            low = 0.3 if method == "gram" else 0.6  # bf16 is too coarse for its steep start
            assert low < float(torch.linalg.matrix_norm(out.double(), 2)) < 1.35, method


def test_a_nan_stays_in_its_own_matrix():
    g = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    g[0, 0, 0] = float("nan")
    out = newton_schulz(g)
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_padding_with_zeros_is_exact(method: str):
    g = torch.randn(10, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    padded = torch.zeros(16, 32, dtype=torch.float64)
    padded[:10, :20] = g
    out = newton_schulz(padded, dtype=torch.float64, method=method)
    assert torch.equal(out[10:], torch.zeros(6, 32, dtype=torch.float64))
    assert relative(out[:10, :20], newton_schulz(g, dtype=torch.float64, method=method)) < 1e-11


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


def test_auto_is_one_of_the_methods_and_never_gram_in_bf16():
    for shape in ((20, 60), (60, 20), (192, 576), (640, 200)):
        g = randn(*shape)
        for dtype in (*ARITHMETIC, None):
            out = newton_schulz(g, dtype=dtype)
            fit = METHODS if dtype in (torch.float32, torch.float16) else METHODS[:2]
            options = {"dtype": dtype or torch.bfloat16}
            same = [torch.equal(out, newton_schulz(g, method=m, **options)) for m in fit]
            assert any(same), (shape, dtype)
    g = randn(20, 60)
    for method, dtype in (("standard", torch.bfloat16), ("gram", torch.float32)):
        out = newton_schulz(g, method=method)
        assert torch.equal(out, newton_schulz(g, method=method, dtype=dtype)), method


def test_auto_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seam, "_BUILT_FOR_CUDA", True)

    def means(m: int, n: int, dtype: torch.dtype) -> str:
        g = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, m, n))
        return seam.cheapest(g, dtype)

    assert means(6, 5, torch.float16) == means(500, 600, torch.float32) == "gram"
    assert means(600, 501, torch.float16) == means(20, 900, torch.bfloat16) == "symmetric"


def test_restarts_of_the_gram_form():
    tuned = {name: tune_ns_restarts(schedule(name, 5)) for name in ("quintic", "you")}
    assert tuned == {"quintic": (3,), "you": (2,)}
    unguarded = [
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
        (3.31842, -2.48849, 0.51005),
        (2.30065, -1.66890, 0.41881),
    ]
    scaled = [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in unguarded]
    assert tune_ns_restarts(scaled) == (2,)
    assert tune_ns_restarts(schedule("deepseek_v4", 10), 3) == (2, 4, 6)
    assert len(tune_ns_restarts(schedule("quintic", 60), 20)) == 20
    assert tune_ns_restarts(schedule("quintic", 1), 0) == ()
    g, u, v = known_matrix(64, 200, 1 / torch.arange(1, 65, dtype=torch.float64), seed=1)
    rows = schedule("quintic", 20)  # no measured table: the tuned one must carry 20 steps
    out = newton_schulz(g, steps=20, method="gram", dtype=torch.float32)
    image = through_polynomials(1 / torch.arange(1, 65, dtype=torch.float64), rows)
    assert relative(out, u @ torch.diag(image) @ v.T) < 1e-3
    loose = newton_schulz(g, method="gram", restarts=(), dtype=torch.bfloat16)
    tight = newton_schulz(g, method="gram", restarts=(3,), dtype=torch.bfloat16)
    exact = newton_schulz(g, dtype=torch.float64)
    assert relative(loose, exact) > 1 > 0.1 > relative(tight, exact)


def test_operations():
    # GFLOP of one Kimi K2 expert matrix and of its kv_b projection
    assert [round(ns_flops((2048, 7168), 5, m) / 1e9, 1) for m in METHODS] == [687.2, 493.9, 300.6]
    assert round(ns_flops((16384, 512), 5, "gram") / 1e9, 1) == 27.6
    assert ns_flops((3, 4, 7, 5), 2, "standard") == 12 * 2 * (4 * 25 * 7 + 2 * 125)
    assert ns_flops((5, 7), 5, "gram", restarts=0) == 3 * 25 * 7 + 17 * 125
    assert ns_flops((5, 7), 1, "gram") == 3 * 25 * 7 + 125  # one step has no restart


@pytest.mark.parametrize(
    ("steps", "low", "high"),
    [(3, 0.137, 1.86), (5, 0.866, 1.114), (6, 0.998, 1.002), (9, 1.0, 1.0)],
)
def test_cans_goes_on_where_five_steps_end(steps: int, low: float, high: float):
    x = torch.logspace(-2.5, 0, 2000, dtype=torch.float64)
    for a, b, c in schedule("cans", steps):
        x = a * x + b * x**3 + c * x**5
    assert low - 1e-5 <= x.min() and x.max() <= high + 1e-5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"coefficients": "septic"}, "coefficients: expected one of"),
        ({"coefficients": "simple"}, "the triple that is 'quintic' here"),
        ({"coefficients": "deepseekv4"}, "'deepseek_v4' here"),
        ({"coefficients": "aol", "steps": 0}, "1 to 99"),
        ({"coefficients": [(1.0, 2.0)]}, "triple"),
        ({"coefficients": [(1.0, 2.0, 3.0)] * 2}, "pass steps=2"),
        ({"coefficients": (1.0, float("nan"), 3.0)}, "finite"),
        ({"coefficients": 3.0}, "triple"),
        ({"coefficients": "deepseek_v4"}, "pass steps=10"),
        ({"steps": 0}, "1 to 99"),
        ({"method": "svd"}, "method: expected one of auto, standard"),
        ({"restarts": (3,)}, "restarts: only method 'gram'"),
        ({"restarts": "often"}, "restarts: expected 'auto'"),
        ({"restarts": (5,), "method": "gram"}, "from 1 to 4"),
        ({"restarts": (0,), "method": "gram"}, "from 1 to 4"),
        ({"restarts": (3, 2), "method": "gram"}, "ascending"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
    ],
)
def test_refuses_what_nothing_serves(arguments: dict, text: str):
    with pytest.raises(ValueError, match=text):
        newton_schulz(torch.ones(2, 2), **arguments)


def test_refuses_wrong_tensors():
    square = torch.ones(2, 2)
    for call, kind, text in (
        (lambda: newton_schulz(torch.ones(3)), ValueError, r"g: expected \[..., m, n\]"),
        (lambda: newton_schulz([square, torch.ones(3)]), ValueError, r"g\[1\]: expected"),
        (lambda: newton_schulz([square, None]), TypeError, r"g\[1\]: expected a torch.Tensor"),
        (lambda: newton_schulz(square.long()), TypeError, "int64"),
        (lambda: newton_schulz(square.to(torch.complex64)), TypeError, "complex"),
        (lambda: newton_schulz(square.to_sparse()), TypeError, "sparse"),
        (lambda: newton_schulz(square, dtype=torch.int32), TypeError, "dtype"),
        (lambda: newton_schulz(square, steps=5.0), TypeError, "steps"),
        (lambda: newton_schulz(square, method="gram", restarts=(2.5,)), TypeError, "restarts"),
        (lambda: newton_schulz([square, square.to("meta")]), ValueError, "device"),
        (lambda: syrk(torch.ones(3)), ValueError, "syrk: a"),
        (lambda: syrk(square, c=torch.ones(3, 3)), ValueError, "syrk: c: expected shape"),
        (lambda: syrk(square, c=square.double()), TypeError, "syrk: c"),
        (lambda: syrk(square, beta=1.0), ValueError, "needs a matrix c"),
        (lambda: symmetric_matmul(torch.ones(2, 3), square), ValueError, "square"),
        (lambda: symmetric_matmul(square, torch.ones(3, 3)), ValueError, "b: expected shape"),
        (lambda: symmetric_matmul(square, square.to("meta")), ValueError, "b: expected on"),
        (lambda: tune_ns_restarts([(1.0, 2.0, 3.0)], 1), ValueError, "num_restarts"),
        (lambda: tune_ns_restarts([(1.0, 2.0)]), ValueError, "triple"),
        (lambda: ns_flops((3,), 5, "gram"), ValueError, "shape"),
        (lambda: ns_flops((3, 3), 5, "svd"), ValueError, "method"),
        (lambda: ns_flops((3, 3), 0, "gram"), ValueError, "steps"),
        (lambda: ns_flops((3, 3), 5, "gram", restarts=5), ValueError, "restarts"),
    ):
        with pytest.raises(kind, match=text):
            call()
