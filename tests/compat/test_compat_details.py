# SPDX-License-Identifier: MIT
"""What the functions of other libraries promise of rare arguments: each test holds a line that no
other one would miss."""

import pytest
import torch

from kimi_ops.compat import _maps, deep_gemm, megatron, vllm
from kimi_ops.compat import transformer_engine as te
from kimi_ops.compat.grouped_gemm import backend


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def layer(dtype=torch.float32):
    x, w1, w2 = torch.randn(7, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    weights, ids, _ = vllm.fused_topk(x, torch.randn(7, 4), 2, True)
    return x.to(dtype), w1.to(dtype), w2.to(dtype), weights.to(dtype), ids


def test_vllm_weighs_in_float64_where_tokens_are():
    x, w1, w2, weights, ids = layer(torch.float64)
    weights += torch.rand(weights.shape, dtype=torch.float64) * 1e-9  # lost in float32
    gate, up = torch.einsum("efh,th->tef", w1, x).chunk(2, dim=2)
    each = torch.einsum("ehf,tef->teh", w2, torch.nn.functional.silu(gate) * up)
    want = (each.gather(1, ids.long()[..., None].expand(-1, -1, 8)) * weights[..., None]).sum(1)
    error = (vllm.fused_experts(x, w1, w2, weights, ids) - want).norm() / want.norm()
    assert error < 1e-13


def test_vllm_leaves_out_experts_that_no_rank_has():
    x, w1, w2, weights, ids = layer()
    everywhere = torch.arange(4)
    strange = ids.clone()
    strange[1, 0], strange[2, 1] = 4, 9
    dropped = strange.where(strange < 4, -1)
    got = vllm.fused_experts(x, w1, w2, weights, strange, expert_map=everywhere)
    assert torch.equal(got, vllm.fused_experts(x, w1, w2, weights, dropped))


def test_transformer_engine_takes_probs_by_their_old_name_and_in_float64():
    x, mask = torch.randn(5, 3), torch.rand(5, 4) < 0.6
    rows, row_id_map = te.moe_permute(x, mask, int(mask.sum()))
    probs = torch.rand(5, 4)
    want = te.moe_unpermute(rows, row_id_map, probs)
    assert not torch.equal(want, te.moe_unpermute(rows, row_id_map))
    assert torch.equal(te.moe_unpermute(rows, row_id_map, probs=probs), want)
    assert torch.equal(te.moe_unpermute(rows, row_id_map, probs.double()), want)


def test_transformer_engine_has_no_quantiles_of_groups():
    with pytest.raises(ValueError, match="group_topk: expected None, got 1, which is not served"):
        te.fused_topk_with_score_function(
            torch.randn(3, 4), 1, False, 2, 1, None, "sigmoid", None,
            qb_histogram=torch.zeros(4, 8, dtype=torch.int32), qb_bin_bounds=torch.tensor([0.0, 1]),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8], ids=str)
def test_megatron_takes_ids_of_any_integers(dtype):
    logits = torch.randn(5, 6)
    want, ids = megatron.topk_routing_with_score_function(logits, 2, dense_output=True)
    got, same = megatron.topk_routing_with_score_function(
        logits, 2, dense_output=True, precomputed_indices=ids.to(dtype)
    )
    assert torch.equal(got, want) and torch.equal(same, ids)


@pytest.mark.parametrize("trans_a", [False, True])
def test_gmm_writes_to_c(trans_a):
    a, sizes = torch.randn(5, 3), torch.tensor([2, 3])
    b = torch.randn(5, 4) if trans_a else torch.randn(2, 3, 4)
    want = backend.gmm(a, b, sizes, trans_a=trans_a)
    c = torch.full_like(want, torch.nan)
    got = backend.gmm(a, b, sizes, trans_a=trans_a, c=c)
    assert got.data_ptr() == c.data_ptr() and torch.equal(c, want)


def test_a_dropped_pair_is_the_source_of_no_row():
    plan = _maps.by_rows(torch.tensor([[1, -1], [0, 2], [-1, -1]]), 4)
    assert plan.source.tolist() == [2, 0, 3, -1]


def test_deep_gemm_writes_to_a_d_of_any_strides():
    a, b = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 5, 4).bfloat16()
    masked_m, d = torch.tensor([2, 3], dtype=torch.int32), torch.empty(2, 3, 5).bfloat16()
    deep_gemm.m_grouped_bf16_gemm_nt_masked(a, b, d, masked_m, 3)
    other = torch.full((2, 5, 3), torch.nan).bfloat16().mT
    deep_gemm.m_grouped_bf16_gemm_nt_masked(a, b, other, masked_m, 3)
    assert d.any() and torch.equal(other, d)
