# SPDX-License-Identifier: MIT
"""The native products and chains of newton_schulz: every engine against exact arithmetic and the
twin, the bits of a matrix alone and in company, and the operators as citizens of torch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spectra import known_matrix, randn, relative, through_polynomials
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from kimi_ops import newton_schulz, symmetric_matmul, syrk
from kimi_ops.operators import newton_schulz as operators
from kimi_ops.optim import engine as products
from kimi_ops.optim.ns_schedule import schedule
from kimi_ops.reference.newton_schulz import newton_schulz as twin

ops = torch.ops.kimi_ops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = ["standard", "symmetric", "gram"]
QUINTIC = [3.4445, -4.7750, 2.0315] * 5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small(*shape: int, dtype: torch.dtype) -> Tensor:
    """Integers whose products and sums are exact in every dtype and order."""
    return torch.randint(-3, 4, shape).to(dtype)


def turned(x: Tensor) -> Tensor:
    """The same matrix, columns contiguous and apart."""
    return torch.cat((x.mT, x.mT[:, :1]), dim=1)[:, : x.shape[0]].mT


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (31, 70, 9), (129, 33, 600), (300, 65, 40)])
def test_products_are_exact(gemm_engine, dtype, shape):
    m, n, k = shape
    if gemm_engine.slow:
        k = min(k, 136)
    a, b, c = small(m, k, dtype=dtype), small(k, n, dtype=dtype), small(m, n, dtype=dtype)
    exact = (a.double() @ b.double() / 2 + 2 * c.double()).to(dtype)
    for x in (a, turned(a)):
        for y in (b, turned(b)):
            assert torch.equal(products.matmul(x, y, turned(c), 0.5, 2.0), exact)
    lower = (a.double() @ a.double().mT).tril()
    whole = (lower + lower.tril(-1).mT).to(dtype)
    assert torch.equal(syrk(a), whole) and torch.equal(syrk(turned(a)), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_c_the_lower_triangle_is_read(gemm_engine, dtype):
    a, c = small(150, 40, dtype=dtype), small(150, 150, dtype=dtype)
    c = c.tril() + c.tril(-1).mT
    hidden = c.tril() + torch.full_like(c, torch.nan).triu(1)
    assert torch.equal(syrk(a, c=hidden, beta=2.0), syrk(a, c=c, beta=2.0))
    square = syrk(a, alpha=2.0**-6)
    product = symmetric_matmul(square, square, c=hidden, beta=2.0)
    assert torch.equal(product, product.mT) and torch.isfinite(product.float()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60, 200), (300, 129)])
def test_chains_are_as_near_to_fp64_as_the_twin(cpu_engine, dtype, method, shape):
    g = torch.randn(shape)
    rows, restarts = schedule("quintic", 5), (3,) if method == "gram" else ()
    options = {"method": method, "restarts": restarts}
    exact = twin(g.double(), rows, dtype=torch.float64)
    emulated = error(twin(g, rows, dtype=dtype, **options), exact)
    ours = error(newton_schulz(g, dtype=dtype, **options), exact)
    assert ours <= 1.25 * emulated + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name,steps", [("polar_express", 8), ("cubic", 5), ("deepseek_v4", 10)])
def test_other_schedules(cpu_engine, dtype, method, name, steps):
    g = torch.randn(40, 150)
    exact = twin(g.double(), schedule(name, steps), dtype=torch.float64)
    options = {"coefficients": name, "steps": steps, "method": method, "dtype": dtype}
    limit = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]
    assert error(newton_schulz(g, **options), exact) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_has_the_same_bits_alone_and_in_company(
    cpu_engine, dtype, method, two_thread_counts
):
    g = torch.randn(5, 70, 150).to(dtype)
    options = {"method": method, "dtype": dtype}
    batch = newton_schulz(g, **options)
    mixed = newton_schulz([*g, torch.randn(9, 4)], **options)
    for i in range(5):
        alone = newton_schulz(g[i], **options)
        assert torch.equal(batch[i], alone) and torch.equal(mixed[i], alone)
        assert torch.equal(newton_schulz(g[i].mT.contiguous(), **options).mT, alone)
        assert torch.equal(newton_schulz(g[i].mT, **options).mT, alone)
    square = torch.randn(33, 33).to(dtype)
    assert torch.equal(newton_schulz(turned(square), **options), newton_schulz(square, **options))
    if dtype != torch.float16:  # where 2^k g leaves fp16
        assert torch.equal(newton_schulz(g * 2.0**-60, **options), batch)
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        for _ in range(3 if cpu_engine.name in ("portable", "amx_model") else 10):
            assert torch.equal(newton_schulz(g, **options), batch)
            assert torch.equal(newton_schulz(g[0], **options), batch[0])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 7, 31, 129]),
    st.sampled_from([1, 3, 64, 200]),
    st.sampled_from(DTYPES),
    st.sampled_from(METHODS),
)
def test_shapes(m: int, n: int, dtype: torch.dtype, method: str):
    g = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    exact = twin(g.double(), schedule("quintic", 5), dtype=torch.float64)
    ours = newton_schulz(g, dtype=dtype, method=method)
    assert (
        error(ours, exact) < {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(gemm_engine, dtype):
    assert newton_schulz(torch.zeros(3, 5), dtype=dtype).count_nonzero() == 0
    assert newton_schulz(torch.zeros(0, 5), dtype=dtype).shape == (0, 5)
    assert newton_schulz([], dtype=dtype) == []
    tiny = torch.full((4, 6), 1e-42)
    assert torch.equal(newton_schulz(tiny, dtype=dtype), newton_schulz(tiny * 2.0**80, dtype=dtype))
    huge = torch.full((4, 6), 3e38)
    assert torch.isfinite(newton_schulz(huge, dtype=dtype)).all()
    wrong = torch.randn(4, 6)
    wrong[1, 2] = torch.nan
    assert newton_schulz(wrong, dtype=dtype).isnan().any()
    small_norm = torch.full((2, 2), 0.25)
    assert torch.equal(
        newton_schulz(small_norm, dtype=dtype, eps=2.0),
        newton_schulz(small_norm * 4, dtype=dtype, eps=8.0),
    )


def test_576_rows_against_torch_optim_muon():
    g = torch.randn(576, 1536)
    theirs = _zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert error(newton_schulz(g), theirs.double()) < 3e-2


def test_the_input_is_not_written():
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.randn(6, 40).to(dtype)
        before = g.clone()
        newton_schulz(g, dtype=dtype)
        assert torch.equal(g, before)


def test_opcheck():
    a, c = torch.randn(5, 7), torch.randn(5, 5)
    torch.library.opcheck(ops.matrix_product.default, (a, a.mT, c, 1.0, 0.5, True))
    torch.library.opcheck(ops.matrix_product.default, (a, a.mT, None, 1.0, 0.0, False))
    for g in ([torch.randn(4, 6), torch.randn(4, 6)], [torch.randn(6, 4).mT]):
        arguments = (g, QUINTIC, [3], 2, torch.bfloat16, 0.0, False)
        torch.library.opcheck(ops.newton_schulz.default, arguments)


def test_compile_full_graph_with_dynamic_sizes():
    torch._dynamo.reset()

    def both(g: Tensor) -> Tensor:
        x = operators.newton_schulz([g], QUINTIC, [], 1, torch.bfloat16, 0.0, True)
        return syrk(x[0]) * 2

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for m, n in ((3, 9), (17, 5), (40, 41)):
        g = torch.randn(m, n)
        assert torch.equal(compiled(g), both(g))


# ---- CUDA kernels too: m x n on chip, in clusters on Hopper, and in stacks of whole products

cuda_kernels = pytest.mark.parametrize(
    "gemm_engine", ["simt", "simt_sm80", "cuda", "cuda_sm80"], indirect=True
)
ON_CHIP = [(1, 1), (2, 9), (33, 7), (20, 64)]
LARGER = [(129, 136)]  # a stack but on Hopper
ONLY_ON_A_GPU = [(128, 512), (192, 1536), (512, 256), (257, 300), (576, 1100), (1100, 600)]
# of the exact image of a Gaussian matrix
NEAR = {
    ("standard", torch.float32): 1e-5,
    ("gram", torch.float32): 1e-3,
    ("standard", torch.float16): 0.015,
    ("gram", torch.float16): 0.05,
    ("standard", torch.bfloat16): 0.1,
    ("gram", torch.bfloat16): 0.2,
}
SPECTRA = {
    "1 / i": 1.0 / torch.arange(1, 14, dtype=torch.float64),
    "logarithmic": torch.logspace(0, -4, 13, dtype=torch.float64),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(12)]).double(),
    "equal": torch.ones(13, dtype=torch.float64),
}


@cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_kernels_against_the_scalar_polynomial(gemm_engine, dtype: torch.dtype, method: str):
    shapes = ON_CHIP + (LARGER if dtype == torch.float16 else [])
    rows = schedule("quintic", 5)
    for m, n in shapes + ([] if gemm_engine.slow else ONLY_ON_A_GPU):
        g = randn(m, n, seed=m + n)
        u, s, v = torch.linalg.svd(g.cpu().double(), full_matrices=False)
        image = u @ torch.diag(through_polynomials(s, rows)) @ v
        out = newton_schulz(g.to(gemm_engine.device), method=method, dtype=dtype).cpu()
        slack = 8 if min(m, n) == 1 else 1  # a rounding above 1 costs the slope there
        assert relative(out, image) < slack * NEAR[method, dtype], (m, n)


@cuda_kernels
@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
def test_kernels_are_as_exact_as_the_twin(gemm_engine, spectrum: str):
    s = SPECTRA[spectrum]
    for name, restarts in (("quintic", (3,)), ("polar_express", (2,))):
        rows = schedule(name, 5)
        g, u, v = known_matrix(13, 30, s, seed=2)
        image = u @ torch.diag(through_polynomials(s, rows)) @ v.T
        for method in METHODS:
            options = {"method": method, "dtype": torch.float16}
            options["restarts"] = restarts if method == "gram" else ()
            emulated = relative(twin(g.float(), rows, **options), image)
            on_device = g.float().to(gemm_engine.device)
            out = newton_schulz(on_device, coefficients=name, **options).cpu()
            assert relative(out, image) <= 1.25 * emulated + 0.01, (name, method)


@cuda_kernels
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    steps=st.integers(1, 4),
    power=st.integers(-30, 30),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    method=st.sampled_from(METHODS),
)
def test_kernels_keep_bits(gemm_engine, m, n, steps, power, dtype, method):
    g = randn(2, m, n, seed=m * n).to(gemm_engine.device)
    options = {"dtype": dtype, "method": method, "steps": steps}
    out = newton_schulz(g, **options)
    assert torch.equal(newton_schulz(g.flip(0) * 2.0**power, **options), out.flip(0))
    if m != n:  # a square matrix is its own m x n form, and not its transpose's
        assert torch.equal(newton_schulz(g[1].T.contiguous(), **options), out[1].T)
    apart = torch.nn.functional.pad(g[0].T, (0, 3))[:, :m].T  # columns contiguous, and apart
    assert torch.equal(newton_schulz(apart, **options), out[0])


@cuda_kernels
def test_twenty_repeats(gemm_engine):
    g = randn(3, 5, 8).to(gemm_engine.device)
    out = newton_schulz(g, method="gram", dtype=torch.float16)
    for _ in range(20):
        assert torch.equal(newton_schulz(g, method="gram", dtype=torch.float16), out)


CHAIN = operators.newton_schulz
PRODUCT = ops.matrix_product.default
X = torch.ones(3, 4)


@pytest.mark.parametrize(
    "error,text,call",
    [
        (ValueError, r"matrix_product: b: expected shape \[4, N\], got \[3, 4\]",
         lambda: PRODUCT(X, X, None, 1.0, 0.0, False)),
        (TypeError, "matrix_product: b: expected float32, got bfloat16",
         lambda: PRODUCT(X, X.mT.bfloat16(), None, 1.0, 0.0, False)),
        (ValueError, "matrix_product: c: expected a matrix for beta",
         lambda: PRODUCT(X, X.mT, None, 1.0, 1.0, False)),
        (ValueError, "symmetric result is square",
         lambda: PRODUCT(X, torch.ones(4, 5), None, 1.0, 0.0, True)),
        (ValueError, r"newton_schulz: restarts\[0\]: expected ascending steps in 1..4, got 5",
         lambda: CHAIN([X], QUINTIC, [5], 2, torch.bfloat16, 0.0, False)),
        (ValueError, "newton_schulz: num_restarts: expected 0",
         lambda: CHAIN([X], QUINTIC, [2], 1, torch.bfloat16, 0.0, False)),
        (ValueError, "newton_schulz: method: expected 0",
         lambda: CHAIN([X], QUINTIC, [], 3, torch.bfloat16, 0.0, False)),
        (ValueError, "newton_schulz: coefficients: expected 3 a step",
         lambda: CHAIN([X], QUINTIC[:-1], [], 1, torch.bfloat16, 0.0, False)),
        (ValueError, "newton_schulz: steps: expected 1 or more",
         lambda: CHAIN([X], [], [], 1, torch.bfloat16, 0.0, False)),
        (ValueError, "newton_schulz: eps: expected 0 or more",
         lambda: CHAIN([X], QUINTIC, [], 1, torch.bfloat16, -1.0, False)),
        (TypeError, "newton_schulz: dtype: expected fp32, bf16 or fp16",
         lambda: CHAIN([X], QUINTIC, [], 1, torch.float64, 0.0, False)),
        (ValueError, r"newton_schulz: g\[1\]: expected shape \[3, 4\], got \[4, 3\]",
         lambda: CHAIN([X, X.mT], QUINTIC, [], 1, torch.bfloat16, 0.0, False)),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match=text):
        call()
