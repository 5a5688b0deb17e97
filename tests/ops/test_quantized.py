# SPDX-License-Identifier: MIT
"""FP8 and INT4 expert weights: the forms against loops over single values, the ops against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimi_ops import Fp8BlockWeight, Int4GroupWeight, fused_experts, grouped_gemm, topk_gate
from kimi_ops.moe.quantized import QuantizedWeight
from kimi_ops.reference import grouped_gemm as reference

FORMS = [Fp8BlockWeight, Int4GroupWeight]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
RAGGED = [(3, 300, 200), (1, 1, 8), (2, 128, 128), (2, 7, 136), (3, 129, 40), (2, 5, 32)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def stack(shape, seed=0) -> Tensor:
    """Rows and columns of very different size, so that a wrong scale shows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 2, shape[1])[:, None]
    columns = torch.logspace(-1, 1, shape[2])
    return torch.randn(*shape, generator=generator) * rows * columns


def ends(*sizes: int) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    norm, difference = expected.norm(), (value - expected).norm()
    return float(difference / norm if norm > 0 else difference)


def exact(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """[R, N] fp64 for weights [E, N, K]; differentiable in a."""
    parts, start = [], 0
    for expert, end in enumerate(offsets.tolist()):
        parts.append(a[start:end].double() @ w[expert].double().t())
        start = end
    tail = torch.zeros(a.shape[0] - start, w.shape[1], dtype=torch.float64)
    return torch.cat([*parts, tail])


def parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    values = weight.data if isinstance(weight, Fp8BlockWeight) else weight.packed
    return values, weight.scale


def value_of(weight: QuantizedWeight, e: int, n: int, k: int) -> float:
    """One value from the stored bits, by the definition."""
    if isinstance(weight, Fp8BlockWeight):
        bits = int(weight.data.view(torch.uint8)[e, n, k])
        sign, exponent, mantissa = -1 if bits & 128 else 1, bits >> 3 & 15, bits & 7
        q = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        return sign * q * float(weight.scale[e, n // 128, k // 128])
    assert isinstance(weight, Int4GroupWeight)
    word = int(weight.packed[e, n, k // 8]) & 0xFFFFFFFF
    return ((word >> 4 * (k % 8) & 15) - 8) * float(weight.scale[e, n, k // 32])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_every_value_is_what_its_bits_say(form, shape):
    weight = form.quantize(stack(shape))
    assert list(weight.shape) == list(shape)
    whole = weight.dequantize(torch.float32)
    generator = torch.Generator().manual_seed(1)
    places = [torch.randint(0, size, (200,), generator=generator) for size in shape]
    corners = [torch.tensor([0, size - 1]).repeat(4)[:8] for size in shape]
    every = [torch.cat(pair).tolist() for pair in zip(places, corners, strict=True)]
    for e, n, k in zip(*every, strict=True):
        expected = torch.tensor(value_of(weight, e, n, k), dtype=torch.float64).float()
        assert whole[e, n, k] == expected, (e, n, k)


def test_all_bit_patterns_are_read():
    """e4m3 has 254 finite values, a nibble has 16: -8 is read though `quantize` never writes it."""
    bits = torch.arange(256).to(torch.uint8)
    bits[[127, 255]] = 0  # NaN
    fp8 = Fp8BlockWeight(bits.view(torch.float8_e4m3fn).view(1, 2, 128), torch.full((1, 1, 1), 3.0))
    assert fp8.dequantize(torch.float32)[0, 0, 126] == 448 * 3
    int4 = Int4GroupWeight(
        torch.tensor([[[0x76543210, 0xFEDCBA98 - 2**32]]], dtype=torch.int32),
        torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16),
    )
    assert int4.dequantize(torch.float32).flatten().tolist() == [i / 2 for i in range(-8, 8)]
    for weight in (fp8, int4):
        _, rows, columns = weight.shape
        whole = weight.dequantize(torch.float32)
        for n in range(rows):
            for k in range(columns):
                assert whole[0, n, k] == value_of(weight, 0, n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_errors_of_a_round_trip_are_bounded(shape, dtype):
    w = (stack(shape) / 1000).to(dtype)
    fp8 = Fp8BlockWeight.quantize(w)
    assert fp8.data[:, :128, :128].float().abs().amax(dim=(1, 2)).eq(448).all()  # the whole range
    scale = fp8.scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    scale = scale[:, : shape[1], : shape[2]]
    difference = (fp8.dequantize(torch.float32) - w.float()).abs()
    assert (difference <= 1.0001 * torch.maximum(w.float().abs() * 2**-4, scale * 2**-10)).all()
    int4 = Int4GroupWeight.quantize(w)
    scale = int4.scale.float().repeat_interleave(32, 2)[:, :, : shape[2]]
    difference = (int4.dequantize(torch.float32) - w.float()).abs()
    assert (difference <= 0.5001 * scale).all()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_quantised_already_stays_as_it_is(form):
    once = form.quantize(stack((2, 130, 264))).dequantize(torch.float32)
    again = form.quantize(once).dequantize(torch.float32)
    if form is Int4GroupWeight:
        assert torch.equal(once, again)
    else:  # amax / 448 is rounded
        torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_tiny_and_huge_values(form):
    w = torch.zeros(1, 256, 256)
    assert torch.equal(form.quantize(w).dequantize(torch.float32), w)
    w[0, :128, :128], w[0, 128:, 128:] = 1e-38, 3e38
    assert error(form.quantize(w).dequantize(torch.float32)[0, 128:, 128:], w[0, 128:, 128:]) < 1e-2
    assert form.quantize(w).dequantize(torch.float32).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_values_are_rounded_once(form):
    weight = form.quantize(stack((2, 130, 136)))
    wide = weight.dequantize(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(weight.dequantize(dtype), wide.to(dtype))


def every_pattern() -> list[QuantizedWeight]:
    """[1, 2, 128] and [1, 1, 32]; scales that round nothing."""
    bits = torch.arange(256).to(torch.uint8)
    bits[[127, 255]] = 0  # NaN
    fp8 = Fp8BlockWeight(bits.view(torch.float8_e4m3fn).view(1, 2, 128), torch.full((1, 1, 1), 0.5))
    words = torch.tensor([0x76543210, 0xFEDCBA98 - 2**32] * 2, dtype=torch.int32)
    return [fp8, Int4GroupWeight(words.view(1, 1, 4), torch.full((1, 1, 1), 4.0).bfloat16())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 6, 8, 16, 32])
def test_products_with_ones_are_the_values(cpu_engine, rows, dtype):
    """However many rows an expert has: each engine has ways of its own to read few and many."""
    for weight in every_pattern():
        _, n, k = weight.shape
        experts = k // rows + 1
        a = torch.eye(k).to(dtype).repeat(2, 1)[: experts * rows]
        many = type(weight)(*(x.expand(experts, *x.shape[1:]).contiguous() for x in parts(weight)))
        c = grouped_gemm(a, many, ends(*[rows] * experts), out_dtype=torch.float32)
        whole = weight.dequantize(torch.float32)[0].t().repeat(2, 1)
        assert torch.equal(c, whole[: experts * rows])


@pytest.mark.parametrize("rows", [1, 6, 16, 32])
def test_a_weight_of_nan_is_nan(cpu_engine, rows):
    for sign in (0, 128):
        bits = torch.zeros(1, 8, 64, dtype=torch.uint8)
        bits[0, 3, 61] = sign + 127
        weight = Fp8BlockWeight(bits.view(torch.float8_e4m3fn), torch.ones(1, 1, 1))
        c = grouped_gemm(torch.ones(rows, 64).bfloat16(), weight, ends(rows))
        assert c[:, 3].isnan().all() and not c[:, :3].any() and not c[:, 4:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_products(cpu_engine, form, dtype, shape):
    experts, n, k = shape
    weight = form.quantize(stack(shape) / 100)
    w = weight.dequantize(torch.float64)
    sizes = [5, 0, 9][:experts]
    offsets = ends(*sizes)
    rows = sum(sizes)
    a = torch.randn(rows + 2, k).to(dtype)
    a[rows:] = torch.nan
    bias = torch.randn(experts, n).to(dtype)
    expected = exact(a, w, offsets)
    c = grouped_gemm(a, weight, offsets)
    # An engine may round the weights to the dtype of the activations, or keep their fp32.
    tolerance = 2**0.5 * TOLERANCE[dtype]
    assert c.dtype == dtype and error(c, expected) < tolerance
    assert not c[rows:].any()
    wide = grouped_gemm(a, weight, offsets, out_dtype=torch.float32)
    rounded = exact(a, weight.dequantize(dtype), offsets)
    assert wide.dtype == torch.float32
    for ours, exactly, roundly in zip(
        *(x[:rows].split(sizes) for x in (wide, expected, rounded)), strict=True
    ):
        assert min(error(ours, exactly), error(ours, roundly)) < 1e-6  # by the number of rows
    out = torch.full((rows + 2, n), torch.nan)
    assert grouped_gemm(a, weight, offsets, out=out) is out and torch.equal(out, wide)
    expert = torch.repeat_interleave(torch.arange(experts), torch.tensor(sizes))
    expected[:rows] += bias[expert].double()
    assert error(grouped_gemm(a, weight, offsets, bias=bias), expected) < tolerance


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_any_shape(form, sizes, n, words, tail):
    weight = form.quantize(stack((len(sizes), n, 8 * words)) / 100)
    a, plain = torch.randn(sum(sizes) + tail, 8 * words), weight.dequantize(torch.float32)
    expected = exact(a, plain, ends(*sizes))
    # by what is added up: one output may be what little is left of large terms
    terms = exact(a.abs(), plain.abs(), ends(*sizes)).norm()
    found = grouped_gemm(a, weight, ends(*sizes)).double()
    assert (found - expected).norm() <= 1e-6 * terms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_activations(cpu_engine, form, dtype):
    weight = form.quantize(stack((3, 130, 40)) / 100)
    offsets = ends(5, 0, 9)
    a = torch.randn(16, 40).to(dtype).requires_grad_()
    bias = torch.randn(3, 130).to(dtype).requires_grad_()
    other = a.detach().clone().requires_grad_()
    dc = torch.randn(130, 16).to(dtype).t()  # not contiguous
    grouped_gemm(a, weight, offsets, bias=bias).backward(dc)
    exact(other, weight.dequantize(dtype), offsets).backward(dc.double())
    assert a.grad.dtype == dtype and error(a.grad, other.grad) < 2 * TOLERANCE[dtype]
    assert not a.grad[14:].any()
    expected = torch.stack(
        [dc[:5].double().sum(0), dc[:0].double().sum(0), dc[5:14].double().sum(0)]
    )
    assert error(bias.grad, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_gradient_in_float64(form):
    weight = form.quantize(stack((2, 3, 8)))
    a = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    offsets = ends(2, 2)
    assert torch.autograd.gradcheck(
        lambda x, s: grouped_gemm(x, weight, offsets, bias=s), (a, bias)
    )


def routed(tokens, experts, k, hidden, dtype):
    gate = topk_gate(torch.randn(tokens, experts, generator=torch.Generator().manual_seed(2)), k)
    return torch.randn(tokens, hidden).to(dtype), gate.weights, gate.indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", [FORMS[:1] * 2, FORMS[1:] * 2, FORMS], ids=str)
def test_fused_experts(cpu_engine, forms, dtype):
    """The same bits as the dequantised weights wherever they take the same path; else close."""
    experts, hidden, width = 6, 136, 72
    gate_up = forms[0].quantize(stack((experts, 2 * width, hidden)) / 1000)
    down = forms[1].quantize(stack((experts, hidden, width)) / 1000)
    x, weights, indices = routed(20, experts, 2, hidden, dtype)
    x.requires_grad_()
    y = fused_experts(x, gate_up, down, weights, indices)
    (dx,) = torch.autograd.grad(y.sum(), x)
    x64 = x.detach().double().requires_grad_()
    wide = (gate_up.dequantize(dtype).double(), down.dequantize(dtype).double())
    expected = fused_experts(x64, *wide, weights.double(), indices)
    (dx64,) = torch.autograd.grad(expected.sum(), x64)
    assert y.dtype == dtype and error(y, expected) < 4 * TOLERANCE[dtype]
    assert error(dx, dx64) < 6 * TOLERANCE[dtype]
    plain = fused_experts(x, gate_up.dequantize(dtype), down, weights, indices)
    assert error(plain, y) < 2 * TOLERANCE[dtype]  # one matrix quantised, the other not


@pytest.mark.parametrize("form", FORMS)
def test_only_experts_with_rows_are_dequantised_one_at_a_time(form, monkeypatch):
    weight = form.quantize(stack((4, 16, 8)))
    seen = []
    original = form.expert
    monkeypatch.setattr(
        form, "expert", lambda self, e, dtype: seen.append(e) or original(self, e, dtype)
    )
    a = torch.randn(6, 8, requires_grad=True)
    grouped_gemm(a, weight, ends(2, 0, 4, 0)).sum().backward()
    if reference_serves():
        assert seen == [0, 2, 0, 2]
    monkeypatch.setattr(form, "dequantize", None)  # the whole stack is never made
    grouped_gemm(a, weight, ends(2, 0, 4, 0))


def reference_serves() -> bool:
    from kimi_ops import info

    return info()["engines"]["grouped_gemm"]["cpu"].startswith("reference")


def test_autocast_casts_the_activations_only():
    weight = Int4GroupWeight.quantize(stack((2, 16, 8)))
    a = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        c = grouped_gemm(a, weight, ends(2, 4))
    assert c.dtype == torch.bfloat16
    assert torch.equal(c, grouped_gemm(a.bfloat16(), weight, ends(2, 4)))


def test_twenty_runs_have_the_same_bits():
    for form in FORMS:
        weight = form.quantize(stack((3, 64, 72)))
        a = torch.randn(40, 72).bfloat16()
        results = [grouped_gemm(a, weight, ends(20, 1, 19)) for _ in range(20)]
        assert all(torch.equal(results[0], other) for other in results)


def test_the_twin_reads_only_shape_and_items():
    """Guards the seam: `reference.forward` must not ask more of b than `_Stack` has."""
    weight = Fp8BlockWeight.quantize(stack((2, 16, 8)))
    a, offsets = torch.randn(6, 8), ends(2, 4)
    b = weight.dequantize(torch.float32).transpose(1, 2)
    expected = reference.forward(a, b, offsets, None, torch.empty(6, 16))
    assert error(grouped_gemm(a, weight, offsets), expected) < 1e-6


DATA, SCALE = torch.zeros(2, 130, 40).to(torch.float8_e4m3fn), torch.ones(2, 2, 1)
PACKED, GROUPS = torch.zeros(2, 6, 5, dtype=torch.int32), torch.ones(2, 6, 2).bfloat16()


@pytest.mark.parametrize(
    "kind,text,call",
    [
        (TypeError, "Fp8BlockWeight: data: expected a torch.Tensor, got list",
         lambda: Fp8BlockWeight([1], SCALE)),
        (TypeError, "Fp8BlockWeight: data: expected float8_e4m3fn, got float32",
         lambda: Fp8BlockWeight(DATA.float(), SCALE)),
        (ValueError, r"Fp8BlockWeight: data: expected shape \[E, N, K\], got \[130, 40\]",
         lambda: Fp8BlockWeight(DATA[0], SCALE)),
        (ValueError, r"Fp8BlockWeight: data: expected a contiguous tensor",
         lambda: Fp8BlockWeight(DATA.transpose(1, 2), SCALE.transpose(1, 2))),
        (TypeError, "Fp8BlockWeight: scale: expected float32, got bfloat16",
         lambda: Fp8BlockWeight(DATA, SCALE.bfloat16())),
        (ValueError, r"Fp8BlockWeight: scale: expected shape \[2, 2, 1\], got \[2, 1, 1\]",
         lambda: Fp8BlockWeight(DATA, SCALE[:, :1])),
        (ValueError, "Fp8BlockWeight: scale: expected on cpu as data, got meta",
         lambda: Fp8BlockWeight(DATA, SCALE.to("meta"))),
        (TypeError, "Int4GroupWeight: packed: expected int32, got uint8",
         lambda: Int4GroupWeight(PACKED.to(torch.uint8), GROUPS)),
        (ValueError, r"Int4GroupWeight: packed: expected shape \[E, N, K / 8\], got \[6, 5\]",
         lambda: Int4GroupWeight(PACKED[0], GROUPS)),
        (TypeError, "Int4GroupWeight: scale: expected bfloat16, got float32",
         lambda: Int4GroupWeight(PACKED, GROUPS.float())),
        (ValueError, r"Int4GroupWeight: scale: expected shape \[2, 6, 2\], got \[2, 6, 1\]",
         lambda: Int4GroupWeight(PACKED, GROUPS[..., :1].contiguous())),
        (ValueError, "Int4GroupWeight.quantize: weight: expected K.* multiple of 8.*, got 12",
         lambda: Int4GroupWeight.quantize(torch.zeros(1, 2, 12))),
        (ValueError, "Int4GroupWeight.quantize: weight: expected finite values",
         lambda: Int4GroupWeight.quantize(torch.full((1, 2, 8), torch.inf))),
        (TypeError, "Fp8BlockWeight.quantize: weight: expected bfloat16, float16, float32, got",
         lambda: Fp8BlockWeight.quantize(DATA)),
        (ValueError, r"Fp8BlockWeight.quantize: weight: expected shape \[E, N, K\], got \[2, 3\]",
         lambda: Fp8BlockWeight.quantize(torch.zeros(2, 3))),
    ],
)  # fmt: skip
def test_bad_containers(kind, text, call):
    with pytest.raises(kind, match=text):
        call()


A, B = torch.zeros(4, 40), Fp8BlockWeight(DATA, SCALE)
BAD_CALLS = [
    ({"a": A.int()}, TypeError, "a: expected bfloat16, float16, float32, float64, got int32"),
    ({"a": A[:, :39]}, ValueError, r"a: expected shape \[R, K=40\] .*\[2, 130, 40\].*\[4, 39\]"),
    ({"a": A[0]}, ValueError, r"a: expected shape \[R, K=40\]"),
    ({"a": A.to("meta")}, ValueError, "b: expected device meta, got cpu"),
    ({"offsets": ends(1, 2, 3)}, ValueError, r"offsets: expected shape \[E=2\]"),
    ({"offsets": ends(3, 2)}, ValueError, "offsets: expected 0 <="),
    ({"bias": torch.zeros(2, 4)}, ValueError, r"bias: expected shape \[2, 130\], got \[2, 4\]"),
    ({"out": torch.zeros(4, 40)}, ValueError, r"out: expected shape \[4, 130\]"),
    (
        {"a": A.to("meta"), "b": Fp8BlockWeight(DATA.to("meta"), SCALE.to("meta"))},
        ValueError,
        "b: expected a Tensor on meta, got Fp8BlockWeight",
    ),
    (
        {"a": A.clone().requires_grad_(), "out": torch.zeros(4, 130)},
        ValueError,
        "out: no gradient can flow",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_CALLS)
def test_bad_calls(changes, kind, message):
    with pytest.raises(kind, match=f"grouped_gemm: {message}"):
        grouped_gemm(**{"a": A, "b": B, "offsets": ends(1, 3), **changes})


def test_bad_calls_of_fused_experts():
    gate_up, down = Fp8BlockWeight.quantize(torch.ones(3, 10, 8)), torch.ones(3, 8, 5)
    x, weights, indices = routed(4, 3, 2, 8, torch.float32)
    with pytest.raises(TypeError, match="fused_experts: w_gate_up: expected a torch.Tensor beside"):
        fused_experts(x.double(), gate_up, down.double(), weights.double(), indices)
    with pytest.raises(ValueError, match=r"w_gate_up: expected shape \[E, 2F, H=7\], got"):
        fused_experts(x[:, :7], gate_up, down, weights, indices)
    with pytest.raises(ValueError, match=r"w_down: expected shape \[3, 8, 5\], got \[3, 8, 8\]"):
        wrong = Int4GroupWeight.quantize(torch.ones(3, 8, 8))
        fused_experts(x, gate_up, wrong, weights, indices)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows, columns", [(5, 0), (0, 8)])
def test_weights_without_an_element_are_those_of_a_plain_product(form, rows, columns):
    weight = form.quantize(torch.zeros(2, rows, columns))
    y = grouped_gemm(torch.ones(3, columns), weight, ends(1, 2))
    assert y.shape == (3, rows) and not y.any()


@pytest.mark.parametrize("form", FORMS)
def test_experts_without_a_width_give_zeros(form):
    up, down = form.quantize(torch.zeros(2, 0, 8)), form.quantize(torch.zeros(2, 8, 0))
    gate = topk_gate(torch.zeros(3, 2), 1)
    assert not fused_experts(torch.ones(3, 8), up, down, gate.weights, gate.indices).any()
