# SPDX-License-Identifier: MIT
"""Ids, counts and rows of 64 bits whose lowest 32 would mean something: never taken for that."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import kimi_ops.numpy as kn
from kimi_ops.compat import grouped_gemm, torchtitan, transformer_engine, vllm
from kimi_ops.compat.grouped_gemm import backend

WIDE = 2**32  # of which 0 is left
REFUSED = r"expected (ids in -1 \.\. 3|an expert in 0\.\.2)"
FAR = pytest.mark.parametrize("far", [WIDE + 1, -WIDE + 1, 2**62 + 1, -(2**63) + 1])


def ids_of(far: int) -> Tensor:
    return torch.tensor([[0, 1], [far, 0], [1, 2]])


def experts(ids: Tensor, **more: Tensor) -> Tensor:
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(3, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    return vllm.fused_experts(x, w1, w2, torch.ones(ids.shape), ids, **more)


@FAR
def test_experts_of_vllm(far):
    with pytest.raises(ValueError, match=REFUSED):
        experts(ids_of(far))
    with pytest.raises(ValueError, match=REFUSED):
        vllm.moe_align_block_size(ids_of(far), 2, 3)


@FAR
def test_ids_and_places_of_an_expert_map(far):
    places = torch.tensor([0, 1, 2])
    of_others = experts(torch.where(ids_of(far) == far, -1, ids_of(far)))
    assert torch.equal(experts(ids_of(far), expert_map=places), of_others)
    with pytest.raises(ValueError, match=REFUSED):
        experts(torch.tensor([[0], [1], [2]]), expert_map=torch.tensor([0, far, 2]))


def test_only_whole_ids():
    with pytest.raises(TypeError, match=r"topk_ids: expected .*int32.* got float32"):
        experts(ids_of(1).float())
    with pytest.raises(TypeError, match=r"expert_map: expected .*int32.* got float32"):
        experts(ids_of(1), expert_map=torch.zeros(3))
    assert torch.equal(experts(ids_of(1).to(torch.uint32)), experts(ids_of(1)))


@FAR
def test_experts_of_transformers(far):
    pytest.importorskip("transformers.integrations.moe")
    from kimi_ops.interop.transformers import experts_forward

    module = SimpleNamespace(
        num_experts=3, has_gate=False, has_bias=False, is_transposed=False, is_concatenated=True,
        has_post_expert_norm=False, act_fn=torch.tanh,
        up_proj=torch.randn(3, 6, 8), down_proj=torch.randn(3, 8, 6),
    )  # fmt: skip
    x, ids, weights = torch.randn(3, 8), ids_of(far), torch.ones(3, 2)
    if far < 0:
        with pytest.raises(ValueError, match=REFUSED):
            experts_forward(module, x, ids, weights)
    else:
        elsewhere = experts_forward(module, x, torch.where(ids == far, -1, ids), weights)
        assert torch.equal(experts_forward(module, x, ids, weights), elsewhere)


@pytest.mark.parametrize("sizes", [[WIDE + 1, 2], [1, WIDE + 1], [2**31, 2**31 + 3]], ids=str)
def test_counts_of_rows(sizes):
    a, b, counts = torch.ones(3, 2), torch.ones(2, 2, 4), torch.tensor(sizes)
    with pytest.raises(ValueError, match="offsets"):
        backend.gmm(a, b, counts)
    with pytest.raises(ValueError, match="offsets"):
        backend.gmm(a, torch.ones(3, 4), counts, trans_a=True)
    w = torch.ones(2, 6, 2)
    with pytest.raises(ValueError, match="offsets|offs"):
        torchtitan.run_experts_grouped_mm(w, w.mT.contiguous(), w, a, counts)
    with pytest.raises(ValueError, match="split_sizes"):
        transformer_engine.moe_sort_chunks_by_index(a, counts, torch.tensor([1, 0]))


def test_rows_and_chunks():
    x, ids = torch.randn(3, 4), torch.tensor([[0, 1], [1, 0], [1, 2]])
    rows, row_id_map = grouped_gemm.ops.permute(x, ids)
    far = row_id_map.long()
    far[2] += WIDE
    with pytest.raises((ValueError, RuntimeError)):
        grouped_gemm.ops.unpermute(rows, far, torch.ones(3, 2))
    with pytest.raises(ValueError, match="order"):
        transformer_engine.moe_sort_chunks_by_index(
            x, torch.tensor([1, 2]), torch.tensor([1, WIDE])
        )


@FAR
def test_ids_of_arrays(far):
    with pytest.raises(ValueError, match=REFUSED):
        kn.permute_plan(ids_of(far).numpy(), 3)


@FAR
def test_ids_for_jax(far):
    pytest.importorskip("jax")
    import kimi_ops.jax as kj

    refused = pytest.raises(ValueError, match=f"whole numbers of int32, got .*{abs(far)}")
    with refused:
        kj.permute_plan(ids_of(far).numpy(), 3)
    with refused:
        kj.update_expert_bias(np.zeros(2, "f"), np.array([far, 1]), 0.1)
    with refused:
        kj.ragged_dot(np.ones((3, 2), "f"), np.ones((2, 2, 4), "f"), np.array([far, 1]))
