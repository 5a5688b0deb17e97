# SPDX-License-Identifier: MIT
"""The forms of grouped_gemm beside rows by offsets: groups with gaps, added to out, a matrix for
each group, counts, groups of columns and of depth, no groups; on every engine, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from rounding import error, sum_bound
from torch import Tensor

from kimi_ops import grouped_gemm, grouped_gemm_wgrad
from kimi_ops.operators import grouped_gemm as operators

DTYPES = [torch.float32, torch.bfloat16]
STARTS, ENDS = [2, 9, 9, 30, 41], [7, 9, 28, 41, 41]  # gaps, neighbours, empty groups, a tail


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def i32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def with_gaps(dtype: torch.dtype, rows: int = 47, k: int = 40, n: int = 24):
    """a, b, dc, their bounds and what lies in a group; the rest of a and dc is NaN."""
    inside = torch.zeros(rows, dtype=torch.bool)
    for start, end in zip(STARTS, ENDS, strict=True):
        inside[start:end] = True
    a, dc = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
    a[~inside], dc[~inside] = torch.nan, torch.nan
    b = (torch.randn(len(ENDS), n, k) / k**0.5).to(dtype).mT
    return a, b, dc, i32(*STARTS), i32(*ENDS), inside


def exact(a: Tensor, b: Tensor, starts: list[int], ends: list[int]) -> Tensor:
    c = torch.zeros(len(a), b.shape[2], dtype=torch.float64)
    for e, (start, end) in enumerate(zip(starts, ends, strict=True)):
        c[start:end] = a[start:end].double() @ b[e].double()
    return c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_with_gaps(gemm_engine, dtype):
    """Rows of no group are never read, and zero in the result and in the gradient."""
    a, b, dc, starts, ends, inside = with_gaps(dtype)
    a.requires_grad_()
    b.requires_grad_()
    bias = torch.randn(5, 24).to(dtype).requires_grad_()
    c = grouped_gemm(a, b, ends, starts=starts, bias=bias)
    da, db, dbias = torch.autograd.grad(c, (a, b, bias), dc)
    want = exact(a.detach(), b.detach(), STARTS, ENDS)
    back = exact(dc, b.detach().mT, STARTS, ENDS)
    for e, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
        want[start:end] += bias[e].detach().double()
        rows, gradient = a[start:end].detach().double(), dc[start:end].double()
        if start < end:
            assert error(db[e], rows.t() @ gradient) < sum_bound(gemm_engine, end - start, dtype)
            assert error(dbias[e], gradient.sum(0)) < sum_bound(gemm_engine, end - start, dtype)
        else:
            assert not db[e].any() and not dbias[e].any()
    assert error(c, want) < sum_bound(gemm_engine, 40, dtype) and not c[~inside].any()
    assert error(da, back) < sum_bound(gemm_engine, 24, dtype) and not da[~inside].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_adding_to_out(gemm_engine, dtype, out_dtype):
    """One rounding of the sum of all; rows of no group keep their bits."""
    a, b, _, starts, ends, inside = with_gaps(dtype)
    bias = torch.randn(5, 24).to(dtype)
    old = torch.randn(47, 24).to(out_dtype or dtype)
    old[0, :2] = torch.tensor([-0.0, torch.nan]).to(old.dtype)
    for layout in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
        out = layout(old)
        assert grouped_gemm(a, b, ends, starts=starts, bias=bias, out=out, accumulate=True) is out
        want = exact(a, b, STARTS, ENDS)[inside] + old[inside].double()
        for e, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
            mine = torch.zeros(47, dtype=torch.bool)
            mine[start:end] = True
            want[mine[inside]] += bias[e].double()
        assert error(out[inside], want) < sum_bound(gemm_engine, 40, dtype, out.dtype)
        kept = out[~inside].contiguous(), old[~inside].contiguous()
        bits = [t.view(torch.int32 if t.element_size() == 4 else torch.int16) for t in kept]
        assert torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_of_groups_with_gaps(gemm_engine, dtype):
    a, _, dc, starts, ends, _ = with_gaps(dtype)
    main = torch.ones(5, 40, 24)
    grouped_gemm_wgrad(a, dc, ends, starts=starts, out=main, accumulate=True)
    for e, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
        want = a[start:end].double().t() @ dc[start:end].double() + 1
        assert error(main[e], want) < sum_bound(gemm_engine, max(end - start, 1), dtype, main.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [None, [3, 0, 8, 5]])
def test_a_matrix_for_each_group(gemm_engine, dtype, counts):
    a, b = torch.randn(4, 8, 40).to(dtype), (torch.randn(4, 24, 40) / 6).to(dtype).mT
    live = torch.ones(4, 8, dtype=torch.bool)
    number = None if counts is None else i32(*counts)
    if counts is not None:
        live = torch.arange(8) < torch.tensor(counts)[:, None]
        a[~live] = torch.nan
    clean = a.nan_to_num().double()
    x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
    c = grouped_gemm(x, w, counts=number)
    assert error(c, (clean @ b.double())) < sum_bound(gemm_engine, 40, dtype)
    assert not c[~live].any()
    dx, dw = torch.autograd.grad(c, (x, w), torch.ones_like(c))
    ones = live.double()[..., None].expand(4, 8, 24)
    assert error(dx, ones @ b.double().mT) < sum_bound(gemm_engine, 24, dtype)
    assert error(dw, clean.mT @ ones) < sum_bound(gemm_engine, 8, dtype)
    out = torch.ones(4, 8, 24).to(dtype)
    assert grouped_gemm(a, b, counts=number, out=out, accumulate=True) is out
    assert error(out, clean @ b.double() + 1) < sum_bound(gemm_engine, 40, dtype)
    if number is not None:
        assert torch.equal(grouped_gemm(a, b, counts=number.long()), c)
    with torch.no_grad():  # a of any strides
        strided = F.pad(a, (0, 3))[..., :-3].transpose(0, 1).contiguous().transpose(0, 1)
        assert error(grouped_gemm(strided, b, counts=number), c) < sum_bound(gemm_engine, 40, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_columns_and_of_depth(gemm_engine, dtype):
    offsets = i32(16, 16, 48)
    wide, b = torch.randn(3, 10, 32).to(dtype), torch.randn(32, 64).to(dtype)
    c = grouped_gemm(wide, b, offsets)
    ranges = [slice(0, 16), slice(16, 16), slice(16, 48)]
    want = torch.cat(
        [wide[e].double() @ b[:, columns].double() for e, columns in enumerate(ranges)], dim=1
    )
    bound = sum_bound(gemm_engine, 32, dtype)
    assert c.shape == (10, 64) and not c[:, 48:].any() and error(c[:, :48], want) < bound
    out = torch.ones(10, 64).to(dtype)
    assert grouped_gemm(wide, b, offsets, out=out, accumulate=True) is out
    assert error(out[:, :48], want + 1) < bound and bool((out[:, 48:] == 1).all())

    rows, columns = torch.randn(10, 64).to(dtype), torch.randn(64, 24).to(dtype)
    c = grouped_gemm(rows, columns, offsets)
    want = torch.stack([rows[:, d].double() @ columns[d].double() for d in ranges])
    assert error(c, want) < bound
    out = torch.ones(3, 10, 24)
    assert grouped_gemm(rows, columns, offsets, out=out, accumulate=True) is out
    assert error(out, want + 1) < sum_bound(gemm_engine, 32, dtype, out.dtype)


def test_every_form_of_grouped_mm_of_torch():
    offsets = i32(8, 24, 32)
    three, two = torch.randn(3, 16, 32), torch.randn(32, 48)
    for a, b, offs in (
        (torch.randn(32, 16), three, offsets), (three, torch.randn(3, 32, 8), None),
        (three, torch.randn(32, 32), offsets), (torch.randn(16, 32), two, offsets),
    ):  # fmt: skip
        ours, theirs = ([t.clone().requires_grad_() for t in (a, b)] for _ in range(2))
        c, d = grouped_gemm(*ours, offs), F.grouped_mm(*theirs, offs=offs)
        torch.testing.assert_close(c, d)
        gradient = torch.randn_like(c)
        for mine, other in zip(
            torch.autograd.grad(c, ours, gradient), torch.autograd.grad(d, theirs, gradient),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(mine, other)


def test_gradients_in_float64():
    a, b, _, starts, ends, _ = with_gaps(torch.float32, k=3, n=2)
    a, b = a.nan_to_num().double().requires_grad_(), b.double().contiguous().requires_grad_()
    bias = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda *t: grouped_gemm(*t[:2], ends, starts=starts, bias=t[2]), (a, b, bias))
    one, two = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4, 5), (5, 6))
    )
    batch = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert check(lambda x, y: grouped_gemm(x, y, counts=i32(2, 0, 4)), (one, batch))
    assert check(lambda x, y: grouped_gemm(x, y, i32(1, 1, 5)), (one, two))
    other = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert check(lambda x, y: grouped_gemm(x.t(), y, i32(2, 5)), (two, other))


def test_no_groups(gemm_engine):
    a = torch.randn(5, 8)
    none = torch.zeros(0, dtype=torch.int32)
    c = grouped_gemm(a, torch.zeros(0, 8, 6), none)
    assert c.shape == (5, 6) and not c.any()
    out = torch.ones(5, 6)
    grouped_gemm(a, torch.zeros(0, 8, 6), none, out=out, accumulate=True)
    assert bool((out == 1).all())
    assert grouped_gemm_wgrad(a, torch.randn(5, 6), none).shape == (0, 8, 6)
    assert grouped_gemm(torch.zeros(0, 5, 8), torch.zeros(0, 8, 6)).shape == (0, 5, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_and_compile(dtype):
    a, b, dc, starts, ends, _ = with_gaps(dtype)
    a, dc = a.nan_to_num(), dc.nan_to_num()
    check = torch.library.opcheck
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    check(torch.ops.kimi_ops.grouped_gemm.default, (*leaves, ends, None, dtype, starts))
    out = torch.ones(47, 24).to(dtype)
    check(operators.grouped_gemm_out.op, (a, b, ends, None, out, True, starts))
    check(torch.ops.kimi_ops.grouped_gemm_wgrad.default, (a, dc, ends, dtype, starts))

    def every(x, w, offsets, firsts, counts):
        c = grouped_gemm(x, w, offsets, starts=firsts)
        return c.sum() + grouped_gemm(w, w.mT, counts=counts).float().sum()

    torch._dynamo.reset()
    compiled = torch.compile(every, fullgraph=True, dynamic=True, backend="aot_eager")
    counts = i32(1, 0, 40, 7, 3)
    mine = compiled(*leaves, ends, starts, counts)
    torch.testing.assert_close(mine, every(*leaves, ends, starts, counts))
    mine.backward()


A, B, E = torch.ones(6, 8), torch.ones(2, 8, 5), i32(3, 6)
BAD = [
    ((A, B, E), {"starts": i32(4, 4)}, r"starts\[0\]: expected 0\.\.3"),
    ((A, B, E), {"starts": i32(0, 2)}, r"starts\[1\]: expected 3\.\.6"),
    ((A, B, E.long()), {"starts": i32(0, 3).long() - 1}, r"starts\[0\]: expected 0\.\.3"),
    ((A, B, E), {"starts": i32(0)}, r"starts: expected shape \[2\]"),
    ((A, B, E), {"starts": i32(0, 3).long()}, "starts: expected int32"),
    ((A, B, E), {"accumulate": True}, "accumulate: expected out"),
    ((A, B, E), {"counts": E}, "counts: expected none beside 2-D a and 3-D b"),
    ((A, B), {}, "offsets: expected the end of each group"),
    ((B, B.mT, E), {}, "offsets: expected none beside a matrix for each expert"),
    ((B, B.mT), {"counts": i32(9, 0)}, "offsets: expected|starts"),
    ((B, B.mT), {"counts": i32(0, -1)}, r"starts\[1\]"),
    ((B, B.mT), {"counts": i32(1)}, r"counts: expected shape \[2\]"),
    ((B, B.mT), {"counts": E.float()}, "counts: expected int32, int64"),
    ((B, B.mT), {"starts": E}, "starts: expected none beside 3-D a"),
    ((B, B.mT[:1]), {}, "b: expected 2 matrices"),
    ((B, B.mT), {"out": torch.ones(2, 8, 9)}, r"out: expected a contiguous \[2, 8, 8\]"),
    ((B, torch.ones(5, 6), E), {"bias": A}, "bias: expected none beside 3-D a and 2-D b"),
    ((A[0], B, E), {}, r"a, b: expected shapes \[R, K\] and \[E, K, N\], or another form"),
]


@pytest.mark.parametrize(("arguments", "options", "message"), BAD)
def test_bad_calls(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=f"grouped_gemm: ({message})"):
        grouped_gemm(*arguments, **options)
