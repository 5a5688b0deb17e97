# SPDX-License-Identifier: MIT
"""DeepGEMM's grouped products by its names, against a product for each group."""

import pytest
import torch
from torch import Tensor

from kimi_ops import Fp8BlockWeight, Fp8Rows
from kimi_ops.compat import deep_gemm

GROUPS = ([3, 5, 2], [0, 4, 0, 7], [1], [130, 0, 61])


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def labelled(sizes: list[int], align: int, k: int, n: int):
    """Rows padded to `align` a group, as theirs are, label -1; and every row's result."""
    torch.manual_seed(0)
    labels = []
    for group, size in enumerate(sizes):
        labels += [group] * size + [-1] * (-size % align)
    layout = torch.tensor(labels, dtype=torch.int32)
    a, b = torch.randn(len(labels), k).bfloat16(), torch.randn(len(sizes), n, k).bfloat16()
    want = torch.einsum("rk,rnk->rn", a.double(), b.double()[layout.clamp(min=0).long()])
    return a, b, layout, want.masked_fill(layout[:, None] < 0, 0)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_contiguous(sizes, align):
    a, b, layout, want = labelled(sizes, align, 40, 24)
    a[layout < 0] = torch.nan
    d = torch.full((len(a), 24), torch.nan).bfloat16()
    assert deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, d, layout) is None
    assert error(d, want) < 4e-3 and not d[layout < 0].any()
    again = torch.empty_like(d)
    deep_gemm.m_grouped_bf16_gemm_nn_contiguous(a, b.mT.contiguous(), again, layout)
    assert torch.equal(again, d)


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_masked(sizes):
    torch.manual_seed(0)
    groups, most = len(sizes), max(sizes) + 3
    a, b = torch.randn(groups, most, 40).bfloat16(), torch.randn(groups, 24, 40).bfloat16()
    count = torch.tensor(sizes, dtype=torch.int32)
    outside = torch.arange(most) >= count[:, None]
    want = torch.einsum("gmk,gnk->gmn", a.double(), b.double())
    want.masked_fill_(outside[..., None], 0)
    a[outside] = torch.nan
    d = torch.full((groups, most, 24), torch.nan).bfloat16()
    deep_gemm.m_grouped_bf16_gemm_nt_masked(a, b, d, count, most)
    assert error(d, want) < 4e-3 and not d[outside].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", ["none", "d", "other"])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_along_the_rows(sizes, given, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(sum(sizes), 24).bfloat16(), torch.randn(sum(sizes), 16).bfloat16()
    start = torch.randn(len(sizes), 24, 16).to(dtype)
    d = start.clone() if given == "d" else torch.full_like(start, torch.nan)
    c = {"none": None, "d": d, "other": start}[given]
    parts = zip(a.double().split(sizes), b.double().split(sizes), strict=True)
    want = torch.stack([x.T @ y for x, y in parts]) + (0 if given == "none" else start.double())
    ks = torch.tensor(sizes, dtype=torch.int32)
    deep_gemm.k_grouped_bf16_gemm_tn_contiguous(a, b, d, sizes, ks, c)
    assert error(d, want) < (1e-5 if dtype == torch.float32 else 4e-3)
    if given == "other":
        assert torch.equal(start, c)


@pytest.mark.parametrize("k,n", [(256, 128), (200, 150)])
@pytest.mark.parametrize("sizes", GROUPS[:2], ids=str)
def test_fp8(sizes, k, n):
    a, b, layout, _ = labelled(sizes, 4, k, n)
    rows, weight = Fp8Rows.quantize(a), Fp8BlockWeight.quantize(b)
    exact = torch.einsum(
        "rk,rnk->rn", rows.dequantize(torch.float32).double(),
        weight.dequantize(torch.float32).double()[layout.clamp(min=0).long()],
    ).masked_fill(layout[:, None] < 0, 0)  # fmt: skip
    pairs = (rows.data, rows.scale), (weight.data, weight.scale)
    d = torch.empty(len(a), n).bfloat16()
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*pairs, d, layout, recipe=(1, 128, 128))
    assert error(d, exact) < 4e-3 and not d[layout < 0].any()

    count, most = torch.tensor(sizes, dtype=torch.int32), max(sizes)
    x = torch.randn(len(sizes), most, k).bfloat16()
    flat = Fp8Rows.quantize(x.flatten(0, 1))
    data, scale = (t.unflatten(0, (len(sizes), most)) for t in (flat.data, flat.scale))
    wide = flat.dequantize(torch.float32).double().unflatten(0, (len(sizes), most))
    want = torch.einsum("gmk,gnk->gmn", wide, weight.dequantize(torch.float32).double())
    want.masked_fill_((torch.arange(most) >= count[:, None])[..., None], 0)
    d = torch.empty(len(sizes), most, n).bfloat16()
    deep_gemm.m_grouped_fp8_gemm_nt_masked((data, scale), pairs[1], d, count, most)
    assert error(d, want) < 4e-3


def labels(*groups: int) -> Tensor:
    return torch.tensor(groups, dtype=torch.int32)


def good():
    a, b, layout, _ = labelled([2, 3], 1, 8, 4)
    return dict(a=a, b=b, d=torch.empty(5, 4).bfloat16(), grouped_layout=layout)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(use_psum_layout=True), "use_psum_layout: expected False, got True"),
        (dict(expected_m_for_psum_layout=4), "expected_m_for_psum_layout: expected None"),
        (dict(a=torch.zeros(5, 8)), "a: expected bfloat16, got float32"),
        (dict(grouped_layout=labels(0, 1, 0, 1, 1)), "grouped_layout: expected group"),
        (dict(grouped_layout=labels(0, 0, 1, 1, 2)), "grouped_layout: expected groups"),
        (dict(grouped_layout=torch.zeros(4).int()), "grouped_layout: expected shape"),
        (dict(grouped_layout=torch.zeros(5).long()), "grouped_layout: expected int32"),
        (dict(a=torch.zeros(5, 8).bfloat16().requires_grad_()), "a: no gradient flows"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"^m_grouped_bf16_.*contiguous: {message}"):
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(**{**good(), **changes})


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(recipe=(1, 1, 128)), r"recipe: expected \(1, 128, 128\), got \(1, 1, 128\)"),
        (dict(recipe_b=(1, 32)), "recipe_b: expected"),
        (dict(packed=True), r"a\[1\]: expected float32, got int32; packed scales"),
        (dict(use_psum_layout=True), "use_psum_layout: expected False"),
    ],
)
def test_fp8_refuses(changes, message):
    a, b, layout, _ = labelled([2, 3], 1, 128, 128)
    rows, weight = Fp8Rows.quantize(a), Fp8BlockWeight.quantize(b)
    scale = rows.scale.int() if changes.pop("packed", False) else rows.scale
    with pytest.raises((TypeError, ValueError), match=f"^m_grouped_fp8_.*contiguous: {message}"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (rows.data, scale), (weight.data, weight.scale), torch.empty(5, 128).bfloat16(), layout,
            **changes,
        )  # fmt: skip


def test_the_rows_of_the_groups_are_said_once():
    a, d = torch.zeros(5, 4).bfloat16(), torch.zeros(2, 4, 4)
    ks = torch.tensor([2, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="ks_cpu: expected the numbers of grouped_layout"):
        deep_gemm.k_grouped_bf16_gemm_tn_contiguous(a, a, d, [3, 2], ks, d)
    with pytest.raises(ValueError, match="use_psum_layout: expected False"):
        deep_gemm.k_grouped_bf16_gemm_tn_contiguous(a, a, d, [2, 3], ks, d, use_psum_layout=True)
