# SPDX-License-Identifier: MIT
"""FP8 rows and their product with FP8 weights: bits of the rows against torch, products against
fp64 within the error of the promoted sum, contracts of the operators."""

import warnings

import pytest
import torch
from rounding import UNIT, error, fp8_bound
from torch import Tensor

from kimi_ops import (
    Fp8BlockWeight,
    Fp8Rows,
    _native,
    fused_experts,
    grouped_gemm,
    info,
    permute,
    permute_plan,
    topk_gate,
    unpermute,
)
from kimi_ops.formats import dequantize_rows, quantize_rows
from kimi_ops.operators import fp8
from kimi_ops.reference import quantized as reference
from kimi_ops.reference.fused_experts import activate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8 = torch.float8_e4m3fn
# sizes of groups, K, N: ragged blocks, both tiles of the kernel, empty groups
SHAPES = [((5, 0, 9), 128, 64), ((70,), 272, 200), ((1, 0, 0, 3), 16, 8), ((66, 3), 144, 392)]
# groups that begin at every row modulo 4: within a tile of the kernel, and beyond its first half
SHAPES += [((1, 2, 3, 1, 4, 66), 144, 72), ((2, 65, 67, 1, 3), 128, 40), ((3, 130, 6), 272, 136)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def product_engine(gemm_engine):
    """`gemm_engine`, where the warning of GPUs without the kernel is expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*dequantised to bfloat16")
        yield gemm_engine


def ends(*sizes: int) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def operands(sizes, k: int, n: int, tail: int = 0) -> tuple[Fp8Rows, Fp8BlockWeight, Tensor]:
    """Rows and columns of very different size, so that a wrong scale shows."""
    rows = sum(sizes) + tail
    x = torch.randn(rows, k) * torch.logspace(-1, 1, k) * torch.logspace(-2, 2, rows)[:, None]
    w = torch.randn(len(sizes), n, k) * torch.logspace(-1, 1, n)[:, None] / k**0.5
    return Fp8Rows.quantize(x), Fp8BlockWeight.quantize(w), ends(*sizes)


def served(engine) -> bool:
    """By the kernel for Hopper, on a GPU or on the host."""
    return engine.name.startswith(("cuda", "simt")) and _native.engine.grouped_gemm_fp8_served(
        torch.empty(0, device=engine.device)
    )


def allowed(engine, a: Fp8Rows, w: Fp8BlockWeight, offsets: Tensor, bias=None) -> Tensor:
    """Of each element's error, from the sum of the sizes of its terms."""
    parts = [type(t)(t.data.float().abs().to(FP8), t.scale) for t in (a, w)]
    sizes = twin(*parts, offsets, None if bias is None else bias.abs())
    return sizes * fp8_bound(engine, served(engine))


def quantized_by_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """On the CPU: torch on a GPU multiplies by 1 / 448 instead of dividing."""
    data, scale = quantize_rows(x.cpu())
    return data.to(x.device), scale.to(x.device)


def twin(a: Fp8Rows, w: Fp8BlockWeight, offsets, bias=None, dtype=torch.float64, wide=None):
    parts = [(t.data.cpu(), t.scale.cpu()) for t in (a, w)]
    bias = None if bias is None else bias.cpu()
    result = reference.grouped_gemm_fp8(
        *parts, offsets.cpu(), bias, dtype, wide or torch.float64
    )  # fmt: skip
    return result.to(a.device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits; NaN is NaN, whatever its sign."""
    wide_a, wide_b = a.float(), b.float()
    either = wide_a.isnan() & wide_b.isnan()
    bits = torch.uint8 if a.dtype == FP8 else torch.int32
    return a.dtype == b.dtype and bool((either | (a.view(bits) == b.view(bits))).all())


# ---- rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 128), (9, 400), (130, 48), (4, 1160)])
def test_rows_have_the_bits_of_torch(gemm_engine, dtype, shape):
    x = (torch.randn(shape) * torch.logspace(-6, 4, shape[0])[:, None]).to(dtype)
    x[0, :3] = torch.tensor([0.0, -0.0, 1e-7][: shape[1]]).to(dtype)
    x[-1] = 0
    rows = Fp8Rows.quantize(x)
    data, scale = quantized_by_torch(x)
    assert same_bits(rows.data, data) and same_bits(rows.scale.contiguous(), scale)
    for out in DTYPES:
        assert torch.equal(rows.dequantize(out), dequantize_rows(data, scale).to(out))


def test_every_value_of_a_block_and_every_size_of_a_scale(gemm_engine):
    """All bfloat16 numbers, 127 at a time beside one that sets the scale."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    every = every[every.isfinite()]
    step = 31 if gemm_engine.slow else 1
    block = torch.zeros(-(-every.numel() // 127), 128, dtype=torch.bfloat16)
    block[:, 1:].view(-1, 127).copy_(
        torch.cat([every, every.new_zeros(block.shape[0] * 127 - every.numel())]).view(-1, 127)
    )
    block[:, 0] = torch.logspace(-38, 38, block.shape[0]).bfloat16()
    x = block[::step]
    rows, (data, scale) = Fp8Rows.quantize(x), quantized_by_torch(x)
    assert same_bits(rows.data, data) and same_bits(rows.scale.contiguous(), scale)


def test_rows_with_strides_and_without_elements(gemm_engine):
    x = torch.randn(12, 300)
    for view in (x[::2], x[:, 3:259], x[:, ::3], x.t()[:200], x[1:, 1:2], x[:0], x[:, :0]):
        rows, (data, scale) = Fp8Rows.quantize(view), quantized_by_torch(view)
        assert same_bits(rows.data, data) and same_bits(rows.scale.contiguous(), scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_block(gemm_engine, value):
    x = torch.randn(3, 300)
    x[1, 130] = value
    wide = Fp8Rows.quantize(x).dequantize(torch.float32)
    assert wide[1, 128:256].isnan().all()
    wide[1, 128:256] = x[1, 128:256] = 0
    assert (wide - x).norm() / x.norm() < 0.05
    data, scale = quantized_by_torch(x)
    assert same_bits(Fp8Rows.quantize(x).data, data)


def test_rows_error_is_bounded():
    x = torch.randn(64, 1000)
    rows = Fp8Rows.quantize(x)
    scale = rows.scale.repeat_interleave(128, 1)[:, :1000]
    bound = torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.0001
    assert ((rows.dequantize(torch.float32) - x).abs() <= bound).all()


# ---- products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes,k,n", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_err_as_the_promoted_sum(product_engine, sizes, k, n, dtype, biased):
    """1.25 times the error of the same sums in plain fp32, plus what the engine adds to it and the
    rounding of the result."""
    a, w, offsets = operands(sizes, k, n, tail=2)
    bias = torch.randn(len(sizes), n).to(dtype) if biased else None
    c = grouped_gemm(a, w, offsets, bias=bias, out_dtype=dtype)
    exact = twin(a, w, offsets, bias)
    emulated = twin(a, w, offsets, bias, torch.float32, torch.float32)
    error = 1.25 * (emulated.double() - exact).abs() + allowed(product_engine, a, w, offsets, bias)
    subnormal = 2.0**-25 if dtype == torch.float16 else 0
    rounding = exact.abs() * max(UNIT[dtype], 2.0**-23) + subnormal
    assert c.dtype == dtype
    assert ((c.double() - exact).abs() <= error + rounding).all()
    assert (c[int(offsets[-1]) :] == 0).all()


def test_products_of_small_integers_are_exact(product_engine):
    k, n = 288, 200
    a = Fp8Rows(torch.randint(-3, 4, (40, k)).float().to(FP8), torch.ones(40, 3))
    w = Fp8BlockWeight(torch.randint(-3, 4, (2, n, k)).float().to(FP8), torch.ones(2, 2, 3))
    offsets = ends(13, 27)
    c = grouped_gemm(a, w, offsets, out_dtype=torch.float32)
    assert torch.equal(c, twin(a, w, offsets).float())


def test_scales_in_any_strides_and_rows_of_a_view(product_engine):
    a, w, offsets = operands((9, 12), 256, 72)
    c = grouped_gemm(a, w, offsets)
    for scale in (a.scale.contiguous(), a.scale.repeat(1, 2)[:, :2], a.scale.clone()):
        assert torch.equal(grouped_gemm(Fp8Rows(a.data, scale), w, offsets), c)
    wide = torch.zeros(22, 264).to(FP8)
    wide[1:, 8:].copy_(a.data)
    assert torch.equal(grouped_gemm(Fp8Rows(wide[1:, 8:], a.scale), w, offsets), c)
    padded = Fp8Rows(torch.cat([a.data.float(), a.data.float()]).to(FP8), a.scale.repeat(2, 1))
    part = Fp8Rows(padded.data[21:], padded.scale[21:])
    assert torch.equal(grouped_gemm(part, w, offsets), c)


@pytest.mark.parametrize("k", [1, 100, 137])
def test_any_depth(product_engine, k):
    a, w, offsets = operands((3, 4), k, 40)
    fp8._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        c = grouped_gemm(a, w, offsets, out_dtype=torch.float32)
        assert torch.equal(grouped_gemm(a, w, offsets, out_dtype=torch.float32), c)
    exact = twin(a, w, offsets)
    assert ((c.double() - exact).abs() <= allowed(product_engine, a, w, offsets)).all()
    copied = [w for w in caught if "weights are copied" in str(w.message)]
    assert len(copied) == (1 if _native.engine.grouped_gemm_fp8_served(a.data) else 0)  # once


def test_a_weight_at_any_address(product_engine):
    a, w, offsets = operands((3, 4), 32, 40)
    memory = torch.zeros(2 * 40 * 32 + 1).to(FP8)
    shifted = memory[1:].view(2, 40, 32)
    shifted.copy_(w.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = grouped_gemm(a, Fp8BlockWeight(shifted, w.scale), offsets)
    assert torch.equal(c, grouped_gemm(a, w, offsets))


def test_out(product_engine):
    a, w, offsets = operands((3, 4), 160, 40, tail=1)
    for dtype in DTYPES:
        c = grouped_gemm(a, w, offsets, out_dtype=dtype)
        out = torch.full((8, 40), 7.0, dtype=dtype)
        assert grouped_gemm(a, w, offsets, out=out) is out and torch.equal(out, c)
        wide = torch.full((8, 50), 7.0, dtype=dtype)
        grouped_gemm(a, w, offsets, out=wide[:, 5:45])
        assert torch.equal(wide[:, 5:45], c) and (wide[:, :5] == 7).all()


def test_no_rows_columns_or_depth(product_engine):
    for sizes, k, n in (((0, 0), 32, 16), ((2, 1), 32, 0), ((2, 1), 0, 16)):
        a = Fp8Rows.quantize(torch.randn(sum(sizes), k))
        w = Fp8BlockWeight.empty(len(sizes), n, k, device=a.device)
        c = grouped_gemm(a, w, ends(*sizes), out_dtype=torch.float32)
        assert list(c.shape) == [sum(sizes), n] and (c == 0).all()
        bias = torch.randn(len(sizes), n)
        c = grouped_gemm(a, w, ends(*sizes), bias=bias, out_dtype=torch.float32)
        assert torch.equal(c, bias.repeat_interleave(torch.tensor(sizes), 0))


def test_many_groups_and_a_nan_in_a_row(product_engine):
    sizes = [i % 3 for i in range(70)]
    a, w, offsets = operands(sizes, 48, 24, tail=1)
    a.data[5, 3] = torch.nan
    c = grouped_gemm(a, w, offsets, out_dtype=torch.float32)
    assert c[5].isnan().all()
    exact = twin(a, w, offsets)
    bound = allowed(product_engine, a, w, offsets)
    exact[5] = c[5] = bound[5] = 0
    assert ((c.double() - exact).abs() <= bound).all()


def test_rows_of_one_weight_may_be_split_anywhere(product_engine):
    """Into groups that begin at every row modulo 4: the same bits."""
    a, w, offsets = operands((75,), 272, 72)
    same = Fp8BlockWeight(w.data.repeat(4, 1, 1), w.scale.repeat(4, 1, 1))
    c = grouped_gemm(a, w, offsets)
    for first in range(4):
        assert torch.equal(grouped_gemm(a, same, ends(first, 0, 66, 9 - first)), c)


def test_results_repeat_bitwise(product_engine):
    a, w, offsets = operands((30, 41), 272, 200)
    c = grouped_gemm(a, w, offsets)
    for _ in range(2 if product_engine.slow else 20):
        assert torch.equal(grouped_gemm(a, w, offsets), c)


# ---- a layer


def layer(tokens=21, experts=5, k=3, hidden=144, width=128, dtype=torch.bfloat16):
    weights = [torch.randn(experts, 2 * width, hidden), torch.randn(experts, hidden, width)]
    weights = [Fp8BlockWeight.quantize(w / w.shape[2] ** 0.5) for w in weights]
    gate = topk_gate(torch.randn(tokens, experts), k)
    indices = gate.indices.clone()
    indices[3, 1] = -1
    return torch.randn(tokens, hidden).to(dtype), *weights, gate.weights, indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "situ"])
def test_a_layer_errs_as_its_parts(gemm_engine, activation, dtype):
    """On Hopper rows of x and of h are FP8, as if each step were a pass of its own: but for values
    of h between two of FP8, which the last bit of an activation decides."""
    if not served(gemm_engine):
        pytest.skip("weights are dequantised there")
    x, gate_up, down, weights, indices = layer(dtype=dtype)
    y = fused_experts(x, gate_up, down, weights, indices, activation=activation)
    plan = permute_plan(indices, 5)
    c = grouped_gemm(
        Fp8Rows.quantize(permute(x, plan)), gate_up, plan.offsets, out_dtype=torch.float32
    )
    h = Fp8Rows.quantize(activate(*c.chunk(2, dim=1), activation))
    parts = unpermute(grouped_gemm(h, down, plan.offsets, out_dtype=dtype), plan, weights)
    assert y.dtype == dtype and error(y, parts) < 5e-3
    wide = (gate_up.dequantize(torch.float64), down.dequantize(torch.float64))
    exact = fused_experts(x.double(), *wide, weights.double(), indices, activation=activation)
    assert 1e-3 < error(y, exact) < 0.06


def test_a_layer_says_what_it_cannot_take(gemm_engine):
    if not served(gemm_engine):
        pytest.skip("weights are dequantised there")
    with pytest.raises(ValueError, match="w_down: expected F as a multiple of 128 and H of 16"):
        fused_experts(*layer(width=64))
    x, gate_up, down, *routed = layer()
    with pytest.raises(ValueError, match="w_down: expected both in FP8 on a GPU, got storages 3"):
        fused_experts(x, gate_up, down.dequantize(x.dtype), *routed)


# ---- contracts


def test_gpus_without_the_kernel_are_named_once(gemm_engine):
    a, w, offsets = operands((3,), 32, 16)
    fp8._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            grouped_gemm(a, w, offsets)
    texts = [str(w.message) for w in caught]
    assert [("dequantised to bfloat16" in text) for text in texts] == (
        [True] if gemm_engine.name.startswith(("cuda", "simt")) and not served(gemm_engine) else []
    )


def test_info_says_what_serves_it():
    if not torch.cuda.is_available():
        assert info()["cuda"]["fp8"] == "none"
    elif _native.engine.grouped_gemm_fp8_served(torch.empty(0, device="cuda")):
        assert info()["cuda"]["fp8"] == "cuda (sm_90a)"
    else:
        assert info()["cuda"]["fp8"] == "dequantised to bfloat16 at each call"


BAD = [
    ("b: expected a Fp8BlockWeight", TypeError, lambda a, w, o: (a, w.data.float(), o)),
    (r"a.data: expected shape \[R, 64\]", ValueError,
     lambda a, w, o: (Fp8Rows(a.data[:, :48], a.scale), w, o)),
    (r"offsets: expected shape \[E=2\]", ValueError, lambda a, w, o: (a, w, o[:1])),
    ("offsets: expected 0 <=", ValueError, lambda a, w, o: (a, w, o.flip(0))),
    ("offsets: expected int32", TypeError, lambda a, w, o: (a, w, o.float())),
]  # fmt: skip


@pytest.mark.parametrize("text,kind,change", BAD, ids=[b[0][:20] for b in BAD])
def test_bad_operands_are_refused(text, kind, change):
    with pytest.raises(kind, match=text):
        grouped_gemm(*change(*operands((3, 4), 64, 16)))


def test_bad_options_are_refused():
    a, w, offsets = operands((3, 4), 64, 16)
    with pytest.raises(TypeError, match="out_dtype: expected bfloat16, float16"):
        grouped_gemm(a, w, offsets, out_dtype=torch.float64)
    with pytest.raises(TypeError, match="bias: expected bfloat16"):
        grouped_gemm(a, w, offsets, bias=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"bias: expected shape \[2, 16\]"):
        grouped_gemm(a, w, offsets, bias=torch.zeros(2, 15).bfloat16())
    with pytest.raises(ValueError, match="out: expected shape"):
        grouped_gemm(a, w, offsets, out=torch.zeros(7, 15).bfloat16())
    with pytest.raises(ValueError, match="no gradient flows"):
        grouped_gemm(a, w, offsets, bias=torch.zeros(2, 16).bfloat16().requires_grad_())
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient flows"):
        Fp8Rows.quantize(x)
    with torch.no_grad():
        assert not Fp8Rows.quantize(x).scale.requires_grad
    for bad, text in ((torch.zeros(2, 3, 4), "shape"), (torch.zeros(2, 3).double(), "float64")):
        with pytest.raises((TypeError, ValueError), match=text):
            Fp8Rows.quantize(bad)
    with pytest.raises(ValueError, match=r"scale: expected shape \[7, 1\]"):
        Fp8Rows(a.data, a.scale[:6])
    with pytest.raises(ValueError, match="contiguous columns"):
        Fp8Rows(w.data[0].t(), torch.zeros(64, 1))


@pytest.mark.filterwarnings("ignore")
def test_opcheck():
    a, w, offsets = operands((3, 4), 64, 16)
    x = torch.randn(5, 200).bfloat16()
    torch.library.opcheck(torch.ops.kimi_ops.fp8_rows.default, (x,))
    # test_schema compares inputs by arithmetic that torch has not for FP8
    rest = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for dtype in DTYPES:
        bias = torch.randn(2, 16).to(dtype)
        arguments = (a.data, a.scale, w.data, w.scale, offsets, bias)
        torch.library.opcheck(
            torch.ops.kimi_ops.grouped_gemm_fp8.default, (*arguments, dtype), test_utils=rest
        )
        out = torch.empty(7, 16, dtype=dtype)
        torch.library.opcheck(
            torch.ops.kimi_ops.grouped_gemm_fp8_out.default, (*arguments, out), test_utils=rest
        )


@pytest.mark.filterwarnings("ignore")
def test_compile():
    w = Fp8BlockWeight.quantize(torch.randn(2, 48, 160))

    def layer(x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_gemm(Fp8Rows.quantize(x), w, offsets) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x, offsets = torch.randn(rows, 160), ends(1, rows - 1)
        assert torch.equal(compiled(x, offsets), layer(x, offsets))
