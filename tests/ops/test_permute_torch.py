# SPDX-License-Identifier: MIT
"""The permutation as a citizen of torch: opcheck, compile, bad input."""

import pytest
import torch

from kimi_ops import permute, permute_plan, permute_weights, sort_chunks, unpermute

ops = torch.ops.kimi_ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    ids = torch.randint(-1, 6, (10, 3), dtype=torch.int32)
    plan = permute_plan(ids, 6, align=4)
    torch.library.opcheck(ops.permute_plan.default, (ids, 6, 4))
    x = torch.randn(10, 12).to(dtype).requires_grad_(requires_grad)
    torch.library.opcheck(ops.permute.default, (x, plan.row_map, plan.source))
    y = torch.randn(plan.source.numel(), 12).to(dtype).requires_grad_(requires_grad)
    w = torch.rand(10, 3, requires_grad=requires_grad)
    torch.library.opcheck(ops.unpermute.default, (y, plan.row_map, plan.source, w))
    torch.library.opcheck(ops.unpermute.default, (y, plan.row_map, plan.source, None))
    detached = (x.detach(), y.detach(), plan.row_map, plan.source, w.detach())
    torch.library.opcheck(ops.unpermute_backward.default, detached)
    sizes, order = torch.tensor([3, 0, 5]).int(), torch.tensor([2, 0, 1]).int()
    torch.library.opcheck(ops.sort_chunks.default, (x, sizes, order, False))


def test_compile_full_graph_with_dynamic_tokens():
    torch._dynamo.reset()

    def round_trip(x, ids, w):
        plan = permute_plan(ids, 6, align=2)
        rows = torch.tanh(permute(x, plan)) * permute_weights(w, plan)[:, None]
        return unpermute(rows, plan, w).square().sum()

    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 17, 40):
        ids = torch.randint(-1, 6, (tokens, 3), dtype=torch.int32)
        a = [torch.randn(tokens, 8).requires_grad_(), torch.rand(tokens, 3).requires_grad_()]
        b = [t.detach().clone().requires_grad_() for t in a]
        x, y = compiled(a[0], ids, a[1]), round_trip(b[0], ids, b[1])
        x.backward()
        y.backward()
        assert torch.equal(x, y)
        assert all(torch.equal(s.grad, t.grad) for s, t in zip(a, b, strict=True))


IDS = torch.zeros(2, 2, dtype=torch.int32)
PLAN = permute_plan(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), 2)
CHUNKS = torch.tensor([1, 2]).int()
ROWS = torch.zeros(3, 2)


def order(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "error,text,call",
    [
        (TypeError, "permute_plan: indices: expected int32, got int16",
         lambda: permute_plan(IDS.short(), 4)),
        (ValueError, r"permute_plan: indices: expected shape \[T, K\], got \[2\]",
         lambda: permute_plan(IDS[0], 4)),
        (ValueError, r"permute_plan: indices.shape\[1\]: expected 1..",
         lambda: permute_plan(IDS[:, :0], 4)),
        (ValueError, "permute_plan: num_experts: expected 1..1024, got 0",
         lambda: permute_plan(IDS, 0)),
        (TypeError, "permute_plan: num_experts: expected an int, got float",
         lambda: permute_plan(IDS, 2.0)),
        (ValueError, "permute_plan: align: expected 1..", lambda: permute_plan(IDS, 4, align=0)),
        (ValueError, r"indices\[1, 0\]: expected an expert in 0..3, or -1 for none, got 5",
         lambda: permute_plan(torch.tensor([[0, 4], [5, 9]]).int(), 4)),
        (ValueError, r"indices\[0, 0\]: expected an expert in 0..3, or -1 for none, got -2",
         lambda: permute_plan(IDS - 2, 4)),
        (ValueError, "permute_plan: indices: expected at most 2147483647 rows",
         lambda: permute_plan(IDS, 1000, align=2**22)),
        (TypeError, "permute: x: expected a torch.Tensor, got list", lambda: permute([1], PLAN)),
        (TypeError, "permute: x: expected a dtype of at most 32 bits, got float64",
         lambda: permute(torch.zeros(2, 4).double(), PLAN)),
        (ValueError, r"permute: x: expected shape \[T=2, H\], got \[3, 4\]",
         lambda: permute(torch.zeros(3, 4), PLAN)),
        (ValueError, "permute: row_map: expected on meta as x, got cpu",
         lambda: permute(torch.zeros(2, 4, device="meta"), PLAN)),
        (ValueError, r"unpermute: y: expected shape \[cap=4, H\], got \[2, 4\]",
         lambda: unpermute(torch.zeros(2, 4), PLAN)),
        (TypeError, "unpermute: y: expected float32, bfloat16, float16, got int32",
         lambda: unpermute(torch.zeros(4, 4).int(), PLAN)),
        (ValueError, r"unpermute: weights: expected shape \[2, 2\], got \[2, 3\]",
         lambda: unpermute(torch.zeros(4, 4), PLAN, torch.zeros(2, 3))),
        (TypeError, "unpermute: weights: expected float32, got int32",
         lambda: unpermute(torch.zeros(4, 4), PLAN, torch.zeros(2, 2).int())),
        (ValueError, "unpermute: weights: expected on cpu as y, got meta",
         lambda: unpermute(torch.zeros(4, 4), PLAN, torch.zeros(2, 2, device="meta"))),
        (ValueError, r"permute_weights: weights: expected shape \[2, 2\], got \[2, 3\]",
         lambda: permute_weights(torch.zeros(2, 3), PLAN)),
        (ValueError, r"sort_chunks: order\[1\]: expected a permutation of 0..1, got 0",
         lambda: sort_chunks(ROWS, CHUNKS, order(0, 0))),
        (ValueError, r"sort_chunks: order\[1\]: expected a permutation of 0..1, got 2",
         lambda: sort_chunks(ROWS, CHUNKS, order(0, 2))),
        (ValueError, "sort_chunks: split_sizes: expected a sum of at most R = 3 rows, got 4",
         lambda: sort_chunks(ROWS, order(1, 3), order(0, 1))),
        (ValueError, r"sort_chunks: split_sizes\[1\]: expected 0 or more rows, got -1",
         lambda: sort_chunks(ROWS, order(4, -1), order(0, 1))),
        (ValueError, r"sort_chunks: order: expected shape \[2\], got \[1\]",
         lambda: sort_chunks(ROWS, CHUNKS, order(0))),
        (TypeError, "sort_chunks: split_sizes: expected int32, got float32",
         lambda: sort_chunks(ROWS, CHUNKS.float(), order(0, 1))),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match=text):
        call()
