# SPDX-License-Identifier: MIT
"""newton_schulz with AOL's scaling against the formula of Turbo-Muon, and what it keeps of the
promises of the other schedules."""

import pytest
import torch
from spectra import randn, relative
from torch import Tensor

from kimi_ops import MuonClip, newton_schulz
from kimi_ops.optim.ns_schedule import schedule
from kimi_ops.reference.newton_schulz import newton_schulz as twin

ROWS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
METHODS = ["standard", "symmetric", "gram"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 9), (7, 2), (33, 70), (70, 33), (40, 40)]
# Relative distance from the formula in fp64, of Gaussian matrices.
NEAR = {
    ("standard", torch.float32): 1e-5,
    ("gram", torch.float32): 3e-4,
    ("standard", torch.float16): 0.01,
    ("gram", torch.float16): 0.02,
    ("standard", torch.bfloat16): 0.06,
    ("gram", torch.bfloat16): 0.1,
}
kernels = pytest.mark.parametrize(
    "gemm_engine", ["simt", "simt_sm80", "cuda", "cuda_sm80"], indirect=True
)


def turbo_muon(g: Tensor, steps: int = 4) -> Tensor:
    """As published: no norm, rows of the short side over the root of their sums of |X X^T|, whose
    scaled product serves the first step; the last rows of the table."""
    x = g.double().mT if g.shape[0] > g.shape[1] else g.double()
    gram = x @ x.mT
    s = gram.abs().sum(dim=1).rsqrt()
    x, gram = s[:, None] * x, s[:, None] * gram * s
    for a, b, c in ROWS[-steps:]:
        x = a * x + (b * gram + c * gram @ gram) @ x
        gram = x @ x.mT
    return x.mT if g.shape[0] > g.shape[1] else x


def near(g: Tensor, method: str, dtype: torch.dtype, steps: int = 4, slack: float = 1.0) -> Tensor:
    options = {"method": method, "dtype": dtype}
    out = newton_schulz(g, coefficients="aol", steps=steps, **options)
    limit = slack * NEAR["gram" if method == "gram" else "standard", dtype]
    assert relative(out.cpu(), turbo_muon(g.cpu(), steps)) < limit, (tuple(g.shape), method)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_published_formula(cpu_engine, dtype: torch.dtype, method: str):
    for m, n in SHAPES:
        near(randn(m, n, seed=m), method, dtype)
    near(randn(20, 50), method, dtype, steps=5, slack=2)
    for given in (torch.bfloat16, torch.float16):
        near(randn(9, 30).to(given), method, torch.float32, slack=1e3)  # the output is rounded


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels(gemm_engine, dtype: torch.dtype):
    for m, n in ((1, 5), (12, 30), (30, 12)):
        g = randn(m, n, seed=m).to(gemm_engine.device)
        for method in METHODS:
            near(g, method, dtype)
    if not gemm_engine.slow:
        for m, n in ((129, 600), (600, 129), (576, 1100)):
            near(randn(m, n).to(gemm_engine.device), "gram", dtype)


@pytest.mark.parametrize("method", METHODS)
def test_fp64(method: str):
    for m, n in SHAPES:
        g = randn(m, n, seed=n, dtype=torch.float64)
        options = {"steps": 4, "method": method, "dtype": torch.float64}
        out = newton_schulz(g, coefficients="aol", **options)
        assert relative(out, turbo_muon(g)) < 1e-11
        assert torch.equal(newton_schulz(g * 2.0**800, coefficients="aol", **options), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_engines_are_as_near_as_the_twin(cpu_engine, dtype: torch.dtype, method: str):
    g = randn(60, 200)
    options = {"method": method, "restarts": (2,) if method == "gram" else (), "dtype": dtype}
    emulated = relative(twin(g, schedule("aol", 4), aol=True, **options), turbo_muon(g))
    out = newton_schulz(g, coefficients="aol", steps=4, **options)
    assert relative(out, turbo_muon(g)) <= 1.25 * emulated + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bits(cpu_engine, dtype: torch.dtype, method: str, two_thread_counts):
    options = {"coefficients": "aol", "steps": 4, "dtype": dtype, "method": method}
    g = randn(3, 20, 51)
    out = newton_schulz(g, **options)
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        assert torch.equal(newton_schulz(g.flip(0) * 2.0**-40, **options), out.flip(0))
        for x, y in zip(g, out, strict=True):
            assert torch.equal(newton_schulz(x.clone(), **options), y)
            assert torch.equal(newton_schulz(x.mT, **options), y.mT)
            assert torch.equal(newton_schulz(x.mT.contiguous(), **options), y.mT)
    square = g[0, :, :20]
    turned = square.mT.contiguous().mT
    assert torch.equal(newton_schulz(turned, **options), newton_schulz(square, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_has_the_bits_of_standard(cpu_engine, dtype: torch.dtype):
    g = randn(45, 60)
    options = {"coefficients": "aol", "steps": 4, "dtype": dtype}
    standard = newton_schulz(g, method="standard", **options)
    assert torch.equal(newton_schulz(g, method="symmetric", **options), standard)


def test_a_square_matrix_is_scaled_by_rows():
    """Its transpose is scaled by columns: another matrix with another polar factor."""
    g = randn(30, 30, dtype=torch.float64) * torch.logspace(0, -1, 30, dtype=torch.float64)[:, None]
    options = {"coefficients": "aol", "steps": 12, "dtype": torch.float64}
    images = newton_schulz(g, **options), newton_schulz(g.mT.contiguous(), **options).mT

    def polar(x: Tensor) -> Tensor:
        u, _, v = torch.linalg.svd(x)
        return u @ v

    sums = [(product.abs().sum(dim=1).rsqrt()) for product in (g @ g.mT, g.mT @ g)]
    assert relative(images[0], polar(sums[0][:, None] * g)) < 1e-3
    assert relative(images[1], polar(g * sums[1])) < 1e-3
    assert relative(*images) > 0.05 and relative(images[0], polar(g)) > 0.05


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_and_nan_spoils_its_matrix_alone(dtype: torch.dtype, method: str):
    options = {"coefficients": "aol", "steps": 4, "dtype": dtype, "method": method}
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    g = randn(10, 20, dtype=kind)
    padded = torch.zeros(16, 32, dtype=kind)
    padded[:10, :20] = g
    out = newton_schulz(padded, **options)
    assert out[10:].count_nonzero() == 0 and out[:, 20:].count_nonzero() == 0
    units = 60 if method == "gram" else 6
    assert relative(out[:10, :20], newton_schulz(g, **options)) < units * torch.finfo(dtype).eps
    holes = torch.stack([g, g, torch.zeros_like(g)])
    holes[0, 3, 4] = torch.nan
    images = newton_schulz(holes, **options)
    assert images[0].isnan().all() and images[2].count_nonzero() == 0
    assert torch.equal(images[1], newton_schulz(g, **options))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rows_far_below_the_norm(dtype: torch.dtype):
    """Small rows become as large as the others as long as their products with the rest are
    numbers; below that they are zeros, and nothing becomes infinite."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for power, kept in ((10, True), (15, True), (60, False)):
        g = randn(12, 40, dtype=kind)
        g[5:] *= 2.0**-power
        out = newton_schulz(g, coefficients="aol", steps=4, dtype=dtype)
        assert out.isfinite().all() and torch.linalg.matrix_norm(out.double(), 2) < 1.2
        if kept:
            limit = {torch.float64: 1e-10, torch.float32: 1e-3}.get(dtype, 0.2)
            assert relative(out[5:], turbo_muon(g)[5:]) < limit, power
    for power, kept in ((14, True), (70, dtype == torch.float64)):
        apart = torch.diag(torch.tensor([1.0, 2.0**-power], dtype=kind))
        image = newton_schulz(apart, coefficients="aol", steps=4, dtype=dtype)
        assert image[0, 0] > 0.9 and bool(image[1, 1] > 0.9) == kept, power


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_eps_bounds_what_rows_are_divided_by(dtype: torch.dtype, method: str):
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.diag(torch.tensor([0.25, 1.0], dtype=kind)) * 2.0**-10
    options = {"coefficients": "aol", "steps": 4, "dtype": dtype, "method": method}

    def image(x: float) -> float:
        for a, b, c in ROWS[1:]:
            x = a * x + b * x**3 + c * x**5
        return x

    slack = 200 * torch.finfo(dtype).eps if dtype.itemsize > 2 else 0.05
    for eps, values in ((0.0, (1, 1)), (2.0**-11, (0.5, 1)), (2.0**-9, (0.125, 0.5))):
        out = newton_schulz(g, eps=eps, **options)
        wanted = torch.diag(torch.tensor([image(x) for x in values], dtype=kind))
        torch.testing.assert_close(out, wanted, rtol=slack, atol=slack)


def test_steps():
    assert [schedule("aol", k) for k in (1, 4, 5)] == [tuple(ROWS[-k:]) for k in (1, 4, 5)]
    assert schedule("aol", 7) == (*ROWS, *[(1.875, -1.25, 0.375)] * 2)
    g = randn(20, 90, dtype=torch.float64)
    out = newton_schulz(g, coefficients="aol", steps=9, dtype=torch.float64)
    assert (torch.linalg.svdvals(out) - 1).abs().max() < 1e-4


def test_no_direction_is_reversed():
    """What others call "aol" is a table that follows the plain norm: values above 0.884 of the norm
    come out negative. Given as a list it does that here, too; AOL's own rows do not."""
    table = [
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ]
    g = randn(8, 1, seed=1) @ randn(1, 20, seed=2)
    ours = newton_schulz(g, coefficients="aol", steps=4, dtype=torch.float32)
    theirs = newton_schulz(g, coefficients=table, steps=4, dtype=torch.float32)
    assert (theirs * g).sum() < 0 < (ours * g).sum()
    assert torch.allclose(theirs, -0.994 * g / g.norm(), atol=1e-3)
    for method in METHODS:
        for dtype in DTYPES:
            options = {"method": method, "dtype": dtype}
            out = newton_schulz(g, coefficients="aol", steps=4, **options)
            assert 0.9 < float(torch.linalg.matrix_norm(out, 2)) < 1.1
            assert (out.sign() * g.sign() >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_of_muon_clip(dtype: str):
    weight = torch.nn.Parameter(randn(3, 24, 10))
    start, weight.grad = weight.detach().clone(), randn(3, 24, 10, seed=1)
    group = {"params": [weight], "ns_coefficients": "aol", "ns_steps": 4}
    optimizer = MuonClip([group], lr=0.5, weight_decay=0.0, nesterov=False, ns_dtype=dtype, eps=0.0)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["ns_coefficients"] == "aol"
    optimizer.step()
    for i in range(3):
        moved = (start[i] - weight[i].detach()) / (0.5 * (24 / 10) ** 0.5)
        assert relative(moved, turbo_muon(weight.grad[i])) < 0.02
    options = {"coefficients": "aol", "steps": 4, "dtype": getattr(torch, dtype)}
    images = newton_schulz(optimizer.state[weight]["momentum_buffer"], **options)
    expected = start - 0.5 * (24 / 10) ** 0.5 * images
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-6)
