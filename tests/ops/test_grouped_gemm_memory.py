# SPDX-License-Identifier: MIT
"""grouped_gemm in unusual memory: layouts that look like others, outputs that others use."""

import pytest
import torch
from rounding import error, sum_bound
from torch import Tensor

from kimi_ops import Fp8BlockWeight, Int4GroupWeight, grouped_gemm, grouped_gemm_wgrad


def ends(*sizes: int) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize("rows", [5, 12_000, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wgrad_of_column_major_rows(gemm_engine, rows, dtype):
    """The sum over many rows, which lie side by side: never the path of few rows of weights."""
    if gemm_engine.slow:
        rows = min(rows, 700)
    elif gemm_engine.name in ("portable", "amx_model"):
        rows = min(rows, 12_000)
    a = torch.randn(rows, 8).to(dtype)
    dc = torch.randn(40, rows).to(dtype).t()
    expected = (a.double().t() @ dc.double())[None]
    for left, right, exact in ((a, dc, expected), (dc, a, expected.mT)):
        narrow = grouped_gemm_wgrad(left, right, ends(rows))
        assert error(narrow, exact) < sum_bound(gemm_engine, rows, dtype)
        main = torch.empty(exact.shape)
        grouped_gemm_wgrad(left, right, ends(rows), out=main)
        assert error(main, exact) < sum_bound(gemm_engine, rows, dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k, n", [(1, 5), (33, 64), (95, 31), (300, 97)])
def test_wgrad_added_to_a_part_of_a_buffer(gemm_engine, k, n, dtype):
    """Whole numbers, so that sums are exact: groups without rows, of one, of several blocks of
    depth; rows or columns of the sums contiguous; operands in either order. What lies around the
    part keeps its values."""
    sizes = [0, 1, 4, 0, 33] if gemm_engine.slow else [0, 1, 4, 0, 33, 512, 1100, 0]
    a = torch.randint(-2, 3, (sum(sizes), k)).to(dtype)
    dc = torch.randint(-2, 3, (sum(sizes), n)).to(dtype)
    groups = zip(a.double().split(sizes), dc.double().split(sizes), strict=True)
    exact = torch.stack([left.t() @ right for left, right in groups])
    for turned in (False, True):
        if turned:
            a, dc = a.t().contiguous().t(), dc.t().contiguous().t()
        for transposed in (False, True):
            shape = (len(sizes), n + 3, k + 9) if transposed else (len(sizes), k + 3, n + 9)
            memory = torch.full(shape, 7.0)
            out = memory[:, 2:-1, 3:-6].mT if transposed else memory[:, 2:-1, 3:-6]
            grouped_gemm_wgrad(a, dc, ends(*sizes), out=out, accumulate=True)
            assert torch.equal(out.double(), exact + 7)
            out.fill_(7.0)
            assert (memory == 7.0).all(), "elements beside the part were written"


def test_gradients_of_a_single_column(gemm_engine):
    a = torch.randn(3000, 8, requires_grad=True)
    b = torch.randn(1, 8, 1, requires_grad=True)
    bias = torch.randn(1, 1, requires_grad=True)
    g = torch.randn(1, 3000)
    (grouped_gemm(a, b, ends(3000), bias=bias).t() * g).sum().backward()
    assert error(b.grad[0], a.detach().double().t() @ g.double().t()) < 1e-5
    assert error(bias.grad, g.double().sum()[None, None]) < 1e-4
    assert error(a.grad, g.double().t() @ b.detach()[0].double().t()) < 1e-6


@pytest.mark.parametrize("k, n", [(1, 5), (5, 1), (1, 1)])
def test_wgrad_into_a_strided_line(k, n):
    a, dc = torch.randn(9, k), torch.randn(9, n)
    exact = torch.stack([a[:4].t() @ dc[:4], a[4:].t() @ dc[4:]])
    memory = torch.full((2, 2 * k, 3 * n), 7.0)
    out = memory[:, ::2, ::3]
    grouped_gemm_wgrad(a, dc, ends(4, 5), out=out)
    torch.testing.assert_close(out, exact)
    grouped_gemm_wgrad(a, dc, ends(4, 5), out=out, accumulate=True)
    torch.testing.assert_close(out, 2 * exact)
    out.fill_(7.0)
    assert (memory == 7.0).all(), "elements beside the view were written"


@pytest.mark.parametrize("form", [Fp8BlockWeight, Int4GroupWeight])
def test_strided_bias_beside_quantised_weights(form):
    weight = form.quantize(torch.randn(3, 16, 40))
    a = torch.randn(9, 40)
    for bias in (torch.randn(16, 3).t(), torch.randn(1, 16).expand(3, 16)):
        ours = grouped_gemm(a, weight, ends(4, 0, 5), bias=bias)
        assert torch.equal(ours, grouped_gemm(a, weight, ends(4, 0, 5), bias=bias.contiguous()))


A, B, OFFSETS = torch.randn(6, 4), torch.randn(2, 4, 4), ends(2, 4)


def test_an_output_changes_its_version():
    out, weight = torch.ones(6, 4), torch.ones(6, 4, requires_grad=True)
    y = (out * weight).sum()
    grouped_gemm(A, B, OFFSETS, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    main = torch.zeros(2, 4, 4)
    before = main._version
    grouped_gemm_wgrad(A, torch.randn(6, 4), OFFSETS, out=main)
    assert main._version > before


def test_outputs_that_others_use_are_refused():
    leaf = torch.zeros(6, 4, requires_grad=True)
    with pytest.raises(ValueError, match="grouped_gemm: out: no gradient"):
        grouped_gemm(A, B, OFFSETS, out=leaf)
    a = A.clone()
    with pytest.raises(ValueError, match="grouped_gemm: out: expected memory of its own, got some"):
        grouped_gemm(a, B, OFFSETS, out=a)
    assert torch.equal(a, A)
    line = torch.zeros(1, 4, 4).expand(2, 4, 4)
    with pytest.raises(ValueError, match="wgrad: out: expected elements with memory of their own"):
        grouped_gemm_wgrad(A, A, OFFSETS, out=line)
    assert not line.any()


@pytest.mark.parametrize("bad", [[[1.0]], torch.tensor(1.0)])
def test_what_is_no_matrix_is_refused_by_name(bad):
    for arguments in ((bad, B, OFFSETS), (A, B, bad)):
        with pytest.raises(
            (TypeError, ValueError), match="grouped_gemm: (a|offsets|a, b): expected"
        ):
            grouped_gemm(*arguments)
    with pytest.raises((TypeError, ValueError), match="grouped_gemm_wgrad: dc: expected"):
        grouped_gemm_wgrad(A, bad, OFFSETS)
