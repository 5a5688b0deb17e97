# SPDX-License-Identifier: MIT
"""MegaBlocks' grouped_gemm by its names, against one product a group and a sort by expert."""

import pytest
import torch
from torch import Tensor

from kimi_ops.compat import grouped_gemm as gg

SIZES = ([3, 0, 5, 1], [0, 0, 0], [1], [0, 7, 0])
DTYPES = (torch.float32, torch.bfloat16)


def restated(a: Tensor, b: Tensor, sizes: list[int], trans_a: bool, trans_b: bool) -> Tensor:
    """Group e is the next sizes[e] rows; in the dtype of the operands' product."""
    if trans_a:
        parts = zip(a.split(sizes), b.split(sizes), strict=True)
        return torch.stack([x.T @ y for x, y in parts])
    parts = zip(a.split(sizes), b, strict=True)
    return torch.cat([x @ (w.T if trans_b else w) for x, w in parts])


def operands(sizes: list[int], trans_a: bool, trans_b: bool, dtype: torch.dtype, k=6, n=4):
    torch.manual_seed(0)
    a = torch.randn(sum(sizes), k, dtype=torch.float64)
    shape = (sum(sizes), n) if trans_a else (len(sizes), n, k) if trans_b else (len(sizes), k, n)
    b = torch.randn(shape, dtype=torch.float64)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trans", [(False, False), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gmm_and_its_gradients(sizes, trans, dtype):
    a, b = operands(sizes, *trans, dtype)
    c = gg.backend.gmm(a, b, torch.tensor(sizes), *trans)
    assert c.dtype == dtype
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    want = restated(*wide, sizes, *trans)
    dc = torch.randn(want.shape, dtype=torch.float64).to(dtype)
    results = [c, *torch.autograd.grad(c, (a, b), dc)]
    truth = [want, *torch.autograd.grad(want, wide, dc.double())]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for got, exact in zip(results, truth, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=bound, atol=bound)
    if not trans[0]:
        assert torch.equal(gg.ops.gmm(a, b, torch.tensor(sizes).int(), trans[1]), c)


@pytest.mark.parametrize("trans", [(False, False), (False, True), (True, False)], ids=str)
def test_first_and_second_derivatives(trans):
    sizes = torch.tensor([2, 0, 3])
    a, b = operands(sizes.tolist(), *trans, torch.float64, k=3, n=2)
    assert torch.autograd.gradcheck(lambda a, b: gg.backend.gmm(a, b, sizes, *trans), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: gg.backend.gmm(a, b, sizes, *trans), (a, b))


def test_results_go_into_c():
    a, b = (x.detach() for x in operands([2, 3], False, False, torch.float32))
    sizes, c = torch.tensor([2, 3]), torch.full((5, 4), torch.nan)
    assert gg.backend.gmm(a, b, sizes, c=c) is c
    assert torch.equal(c, gg.ops.gmm(a, b, sizes))
    with pytest.raises(ValueError, match="out: no gradient can flow"):
        gg.backend.gmm(a.requires_grad_(), b, sizes, c=c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", [None, 0, 9, 14, 17])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_permutation_by_ids(topk, out, dtype):
    """Pairs in a stable order by expert; those behind `out` rows are dropped."""
    torch.manual_seed(topk)
    tokens, hidden = 7, 5
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    indices = torch.stack([torch.randperm(6)[:topk] for _ in range(tokens)])
    rows, row_id_map = gg.ops.permute(x, indices.squeeze(1) if topk == 1 else indices, out)
    count = out or tokens * topk
    assert len(rows) == count and row_id_map.dtype == torch.int32
    order = indices.flatten().argsort(stable=True)[:count]
    assert torch.equal(rows[: len(order)], x[order // topk]) and not rows[len(order) :].any()
    want = torch.full((tokens * topk,), -1)
    want[order] = torch.arange(len(order))
    assert torch.equal(row_id_map.long(), want.view(tokens, topk).T.flatten())

    probs = torch.rand(tokens, topk).requires_grad_()
    back = gg.ops.unpermute(rows, row_id_map, probs)
    kept = (want >= 0).view(tokens, topk)
    truth = x * (probs * kept).sum(1, keepdim=True)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(back.float(), truth.float(), rtol=bound, atol=bound)
    dy = torch.randn(back.shape).to(dtype)
    for got, exact in zip(
        torch.autograd.grad(back, (x, probs), dy),
        torch.autograd.grad(truth.to(dtype), (x, probs), dy),
        strict=True,
    ):
        torch.testing.assert_close(got.float(), exact.float(), rtol=3 * bound, atol=3 * bound)


def test_without_probs_every_pair_is_a_token():
    x = torch.randn(5, 3)
    rows, row_id_map = gg.ops.permute(x, torch.tensor([2, 0, -1, 0, 1]))
    want = x.clone()
    want[2] = 0  # dropped
    assert torch.equal(gg.ops.unpermute(rows, row_id_map), want)


def test_no_tokens():
    rows, row_id_map = gg.ops.permute(torch.empty(0, 4), torch.empty(0, 2, dtype=torch.int32))
    assert rows.shape == (0, 4)
    assert gg.ops.unpermute(rows, row_id_map, torch.empty(0, 2)).shape == (0, 4)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(trans_a=True, trans_b=True), "trans_a: expected one transposed operand"),
        (dict(batch_sizes=torch.tensor([1.0, 4.0])), "batch_sizes: expected int64"),
        (dict(batch_sizes=torch.tensor([[1, 4]])), "batch_sizes: expected shape"),
        (dict(b=torch.zeros(3, 6, 4)), "b: expected shape"),
        (dict(trans_b=True), "b: expected shape"),
        (dict(trans_a=True), "b: expected shape"),
        (dict(batch_sizes=torch.tensor([1, 9])), "offsets: expected"),
    ],
)
def test_bad_input(changes, message):
    good = dict(a=torch.zeros(5, 6), b=torch.zeros(2, 6, 4), batch_sizes=torch.tensor([1, 4]))
    with pytest.raises((TypeError, ValueError), match=message):
        gg.backend.gmm(**{**good, **changes})


def test_sinkhorn_is_refused():
    with pytest.raises(NotImplementedError, match=r"^sinkhorn_kernel: expected another router"):
        gg.ops.sinkhorn_kernel(torch.rand(3, 4))
