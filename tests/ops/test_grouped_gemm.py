# SPDX-License-Identifier: MIT
"""grouped_gemm and grouped_gemm_wgrad against a loop in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import error
from torch import Tensor

from kimi_ops import grouped_gemm, grouped_gemm_wgrad
from kimi_ops.operators import grouped_gemm as operators

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {
    "balanced": [4, 4, 4, 4],
    "ragged": [3, 0, 1, 8],
    "one expert": [7],
    "one row": [0, 0, 1, 0],
    "all to one": [0, 0, 20, 0],
    "first and last empty": [0, 5, 6, 0],
    "no rows": [0, 0, 0],
}


def ends(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def exact(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """[R, N] fp64, expert by expert; differentiable."""
    parts, start = [], 0
    for expert, end in enumerate(offsets.tolist()):
        part = a[start:end].double() @ b[expert].double()
        parts.append(part if bias is None else part + bias[expert].double())
        start = end
    tail = torch.zeros(a.shape[0] - start, b.shape[2], dtype=torch.float64)
    return torch.cat([*parts, tail])


def exact_wgrad(a: Tensor, dc: Tensor, offsets: Tensor) -> Tensor:
    starts = [0, *offsets.tolist()[:-1]]
    pairs = zip(starts, offsets.tolist(), strict=True)
    return torch.stack([a[s:e].double().t() @ dc[s:e].double() for s, e in pairs])


def tensors(sizes: list[int], k: int, n: int, dtype: torch.dtype, tail: int = 3, seed: int = 0):
    """a, b, offsets, bias; the tail rows of a are NaN, as unset memory may be."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    a = torch.randn(rows + tail, k, generator=generator).to(dtype)
    a[rows:] = torch.nan
    b = torch.randn(len(sizes), k, n, generator=generator).to(dtype)
    bias = torch.randn(len(sizes), n, generator=generator).to(dtype)
    return a, b, ends(sizes), bias


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("tail", [0, 3])
def test_forward(dtype, sizes, tail):
    a, b, offsets, bias = tensors(sizes, 7, 5, dtype, tail)
    for shift in (None, bias):
        c = grouped_gemm(a, b, offsets, bias=shift)
        assert c.dtype == dtype and c.shape == (len(a), 5)
        assert error(c, exact(a, b, offsets, shift)) < TOLERANCE[dtype]
        assert torch.equal(c[sum(sizes) :], torch.zeros(tail, 5, dtype=dtype))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_any_shape_and_stride_order(sizes, k, n, tail, transposed, dtype):
    a, b, offsets, _ = tensors(sizes, k, n, dtype, tail)
    if transposed:
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    difference = grouped_gemm(a, b, offsets).double() - exact(a, b, offsets)
    bound = exact(a.abs(), b.abs(), offsets)  # a sum may cancel to nothing
    assert (difference.abs() <= 2 * TOLERANCE[dtype] * bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_results_of_half_precision_are_not_rounded(dtype):
    a, b, offsets, bias = tensors([5, 0, 9], 64, 16, dtype)
    c = grouped_gemm(a, b, offsets, bias=bias, out_dtype=torch.float32)
    assert c.dtype == torch.float32
    assert error(c, exact(a, b, offsets, bias)) < 1e-6
    out = torch.full((len(a), 16), torch.nan)
    assert grouped_gemm(a, b, offsets, bias=bias, out=out) is out
    assert torch.equal(out, c)


def test_out_receives_the_result():
    a, b, offsets, _ = tensors([5, 0, 9], 6, 4, torch.float32)
    out = torch.full((4, len(a)), torch.nan).t()  # column-major
    assert grouped_gemm(a, b, offsets, out=out) is out
    torch.testing.assert_close(out, grouped_gemm(a, b, offsets))


def test_grouped_mm_of_torch_agrees_where_it_works():
    a, b, offsets, _ = tensors([16, 0, 3, 13], 64, 32, torch.float32, tail=0)
    expected = F.grouped_mm(a, b, offs=offsets)
    torch.testing.assert_close(grouped_gemm(a, b, offsets), expected)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_float64(sizes, transposed):
    a, b, offsets, bias = (
        t.double() if t.is_floating_point() else t for t in tensors(sizes, 3, 2, torch.float32)
    )
    a = a.nan_to_num().requires_grad_()
    bias.requires_grad_()
    if transposed:
        weight = b.transpose(1, 2).contiguous().requires_grad_()
        inputs = [a, weight, bias]
        assert torch.autograd.gradcheck(
            lambda x, w, s: grouped_gemm(x, w.transpose(1, 2), offsets, bias=s), inputs
        )
    else:
        inputs = [a, b.requires_grad_(), bias]
        assert torch.autograd.gradcheck(lambda x, w, s: grouped_gemm(x, w, offsets, bias=s), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gradients_equal_those_of_the_loop(dtype, sizes):
    a, b, offsets, bias = tensors(sizes, 24, 10, dtype)
    dc = torch.randn(10, len(a)).to(dtype).t()  # not contiguous
    ours = [t.clone().requires_grad_() for t in (a, b, bias)]
    exactly = [t.clone().requires_grad_() for t in (a, b, bias)]
    grouped_gemm(ours[0], ours[1], offsets, bias=ours[2]).backward(dc)
    exact(exactly[0], exactly[1], offsets, exactly[2]).backward(dc.double())
    rows = sum(sizes)
    assert torch.equal(ours[0].grad[rows:], torch.zeros_like(ours[0].grad[rows:]))
    for mine, other in zip(ours, exactly, strict=True):
        assert mine.grad.dtype == dtype
        assert error(mine.grad, other.grad) < 2 * TOLERANCE[dtype]
    for expert, size in enumerate(sizes):
        if size == 0:
            assert not ours[1].grad[expert].any() and not ours[2].grad[expert].any()


def test_weight_gradients_keep_the_layout_of_the_weights():
    a, b, offsets, _ = tensors([2, 3], 4, 6, torch.float32)
    turned = b.transpose(1, 2).contiguous().transpose(1, 2)  # stored [E, N, K], as nn.Linear does
    for weight in (b, turned):
        weight.requires_grad_()
        c = grouped_gemm(a, weight, offsets)
        (gradient,) = torch.autograd.grad(c.sum(), [weight])
        assert gradient.stride() == weight.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_wgrad(dtype, sizes):
    a, b, offsets, _ = tensors(sizes, 12, 9, dtype)
    dc = torch.randn(len(a), 9).to(dtype)
    dc[sum(sizes) :] = torch.nan
    expected = exact_wgrad(a, dc, offsets)
    dw = grouped_gemm_wgrad(a, dc, offsets)
    assert dw.dtype == dtype and error(dw, expected) < TOLERANCE[dtype]

    main = torch.full(b.shape, torch.nan)
    assert grouped_gemm_wgrad(a, dc, offsets, out=main) is main
    assert error(main, expected) < 1e-6
    before = torch.randn(b.shape)
    main.copy_(before)
    grouped_gemm_wgrad(a, dc, offsets, out=main, accumulate=True)
    assert error(main, expected + before.double()) < 1e-6
    for expert, size in enumerate(sizes):
        if size == 0:
            assert torch.equal(main[expert], before[expert])
            assert not dw[expert].any()

    turned = torch.empty(len(sizes), 9, 12).transpose(1, 2)
    grouped_gemm_wgrad(a, dc, offsets, out=turned)
    assert error(turned, expected) < 1e-6


def test_gradients_that_nobody_asks_for_are_not_computed(monkeypatch):
    a, b = torch.randn(9, 6, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
    c = grouped_gemm(a, b, torch.tensor([4, 9], dtype=torch.int32))
    da, db = torch.autograd.grad(c.sum(), [a, b], retain_graph=True)

    def refuse(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(operators, "grouped_gemm_wgrad", refuse)
        assert torch.equal(torch.autograd.grad(c.sum(), a, retain_graph=True)[0], da)
    monkeypatch.setattr(operators, "grouped_gemm", refuse)
    assert torch.equal(torch.autograd.grad(c.sum(), b)[0], db)


def test_autocast_casts_as_it_does_for_mm():
    a, b, offsets, bias = tensors([5, 0, 9], 16, 8, torch.float32, tail=0)
    weight = b.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(a, b[0]).dtype == torch.bfloat16
        c = grouped_gemm(a.half(), weight, offsets, bias=bias)
        wide = grouped_gemm(a.double(), b.double(), offsets)
    assert c.dtype == torch.bfloat16 and wide.dtype == torch.float64
    expected = grouped_gemm(a.half().bfloat16(), b.bfloat16(), offsets, bias=bias.bfloat16())
    assert torch.equal(c, expected)
    c.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.any()


def test_twenty_runs_have_the_same_bits():
    a, b, offsets, bias = tensors([33, 0, 61, 7], 40, 24, torch.float32)
    results = []
    for _ in range(20):
        x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
        c = grouped_gemm(x, w, offsets, bias=bias)
        c.backward(c.detach())
        results.append((c.detach(), x.grad, w.grad))
    assert all(torch.equal(x, y) for r in results for x, y in zip(results[0], r, strict=True))


def test_shapes_of_38_000_tokens_on_the_meta_device():
    rows = 38_000 * 8
    a = torch.empty(rows, 7168, dtype=torch.bfloat16, device="meta")
    b = torch.empty(384, 4096, 7168, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    offsets = torch.empty(384, dtype=torch.int32, device="meta")
    assert grouped_gemm(a, b, offsets).shape == (rows, 4096)
    dc = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
    assert grouped_gemm_wgrad(a, dc, offsets).shape == (384, 7168, 4096)


A, B, OFFSETS = torch.zeros(4, 3), torch.zeros(2, 3, 5), torch.tensor([1, 4], dtype=torch.int32)
BAD_CALLS = [
    ({"offsets": ends([3, 2])}, ValueError, r"offsets: expected 0 <= .* R = 4, got \[3, 5\]"),
    ({"offsets": torch.tensor([3, 2]).int()}, ValueError, r"offsets: expected .*got \[3, 2\]"),
    ({"offsets": torch.tensor([-1, 2]).int()}, ValueError, r"offsets: expected .*got \[-1, 2\]"),
    ({"offsets": OFFSETS.short()}, TypeError, "offsets: expected int32, int64, got int16"),
    ({"offsets": OFFSETS[:1]}, ValueError, r"offsets: expected shape \[E=2\], got \[1\]"),
    ({"offsets": OFFSETS[None]}, ValueError, r"offsets: expected shape \[E=2\]"),
    ({"offsets": OFFSETS.to("meta")}, ValueError, "offsets: expected on cpu as a, got meta"),
    ({"a": A.int()}, TypeError, "a: expected bfloat16, float16, float32, float64, got int32"),
    ({"a": A[0]}, ValueError, r"a, b: expected shapes \[R, K\] and \[E, K, N\]"),
    ({"b": B[None]}, ValueError, r"a, b: expected shapes \[R, K\] and \[E, K, N\]"),
    ({"b": B.bfloat16()}, TypeError, "b: expected float32, got bfloat16"),
    (
        {"b": B.transpose(1, 2)},
        ValueError,
        r"b: expected shape \[E, K=3, N\], got .* w.transpose\(1, 2\)",
    ),
    ({"b": B.to("meta")}, ValueError, "b: expected on cpu as a, got meta"),
    ({"bias": torch.zeros(2, 4)}, ValueError, r"bias: expected shape \[2, 5\], got \[2, 4\]"),
    ({"bias": torch.zeros(2, 5).half()}, TypeError, "bias: expected float32"),
    ({"out": torch.zeros(4, 4)}, ValueError, r"out: expected shape \[4, 5\] on cpu, got \[4, 4\]"),
    ({"out": torch.zeros(4, 5).half()}, TypeError, "out: expected float32, got"),
    ({"out_dtype": torch.bfloat16}, TypeError, "out_dtype: expected .*, got bfloat16"),
    (
        {"out": torch.zeros(4, 5), "out_dtype": torch.bfloat16},
        TypeError,
        "out: expected torch.bfloat16, got torch.float32",
    ),
    (
        {"out": torch.zeros(4, 5), "b": B.clone().requires_grad_()},
        ValueError,
        "out: no gradient can flow",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_CALLS)
def test_bad_calls(changes, kind, message):
    arguments = {"a": A, "b": B, "offsets": OFFSETS, **changes}
    out = changes.get("out")
    before = None if out is None else out.clone()
    with pytest.raises(kind, match=f"grouped_gemm: {message}"):
        grouped_gemm(**arguments)
    assert out is None or torch.equal(out, before)


DC = torch.zeros(4, 5)
BAD_WGRADS = [
    ({"dc": DC[:3]}, ValueError, "dc: expected 4 rows, got 3"),
    ({"dc": DC.half()}, TypeError, "dc: expected float32"),
    ({"accumulate": True}, ValueError, "accumulate: expected out"),
    ({"out": torch.zeros(2, 5, 3)}, ValueError, r"out: expected shape \[2, 3, 5\]"),
    ({"out": torch.zeros(2, 3, 5).half()}, TypeError, "out: expected float32, got"),
    ({"offsets": ends([3, 2])}, ValueError, "offsets: expected 0 <="),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_WGRADS)
def test_bad_wgrad_calls(changes, kind, message):
    with pytest.raises(kind, match=f"grouped_gemm_wgrad: {message}"):
        grouped_gemm_wgrad(**{"a": A, "dc": DC, "offsets": OFFSETS, **changes})


@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 0], [4], [0, 5, 1]], ids=str)
def test_weight_gradients_are_differentiable(sizes):
    """Once and twice, and with them `grouped_gemm` twice; rows behind the last group get zeros."""
    torch.manual_seed(0)
    offsets = torch.tensor(sizes).cumsum(0).int()
    rows = sum(sizes) + 2
    a, dc = (torch.randn(rows, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    b = torch.randn(len(sizes), 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, dc: grouped_gemm_wgrad(a, dc, offsets), (a, dc))
    assert torch.autograd.gradgradcheck(lambda a, dc: grouped_gemm_wgrad(a, dc, offsets), (a, dc))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_gemm(a, b, offsets), (a, b))
    for grad in torch.autograd.grad(grouped_gemm_wgrad(a, dc, offsets).sum(), (a, dc)):
        assert not grad[sum(sizes) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_weight_gradients_by_the_kernels(dtype):
    sizes = [5, 0, 9, 2]
    offsets = torch.tensor(sizes).cumsum(0).int()
    a, dc = (torch.randn(16, n).to(dtype).requires_grad_() for n in (24, 40))
    dw = torch.randn(4, 24, 40).to(dtype)
    grads = torch.autograd.grad(grouped_gemm_wgrad(a, dc, offsets), (a, dc), dw)
    expert = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    with torch.no_grad():
        wide = [
            torch.einsum("rn,rkn->rk", dc.double(), dw.double()[expert]),
            torch.einsum("rk,rkn->rn", a.double(), dw.double()[expert]),
        ]
    for got, want in zip(grads, wide, strict=True):
        assert got.dtype == dtype
        assert (got - want).norm() / want.norm() < (1e-6 if dtype == torch.float32 else 4e-3)


def test_weight_gradients_into_a_buffer_refuse_to_be_differentiated():
    a, main = A.clone().requires_grad_(), torch.full((2, A.shape[1], DC.shape[1]), torch.nan)
    with pytest.raises(ValueError, match="^grouped_gemm_wgrad: out: no gradient can flow"):
        grouped_gemm_wgrad(a, DC, OFFSETS, out=main)
    with torch.no_grad():
        grouped_gemm_wgrad(a, DC, OFFSETS, out=main)
    assert not main.any()
