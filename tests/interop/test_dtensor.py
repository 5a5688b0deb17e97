# SPDX-License-Identifier: MIT
"""Ops on DTensors of two ranks: what the rules keep in parts stays in parts, values and gradients
are those of whole tensors."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kimi_ops
from kimi_ops.interop import dtensor
from tests.dist.world import launch
from tests.operators.test_derivatives import CHOSEN, ENDS, ORDER, PLAN, SIZES, r
from tests.repo.interfaces import operators

IDS = torch.tensor([[0, 1], [2, 0], [1, -1]], dtype=torch.int32)
WHOLE, ROWS, COLUMNS, LAST = Replicate(), Shard(0), Shard(1), Shard(2)

# (function of tensors and the whole ones beside, inputs, how they lie, beside, how the result lies)
CASES = {
    "topk_gate": (
        lambda z: kimi_ops.topk_gate(z, 2).weights, [r(4, 6)], [ROWS], [], ROWS,
    ),
    "topk_gate given": (
        lambda z, i: torch.ops.kimi_ops.topk_gate_given(z, i, "sigmoid", True, 1.0, None)[0],
        [r(4, 6)], [ROWS], [CHOSEN], ROWS,
    ),
    "counts": (
        lambda z: kimi_ops.topk_gate(z, 2).tokens_per_expert, [r(4, 6)], [ROWS], [], Partial(),
    ),
    "permute": (
        lambda x, m, s: torch.ops.kimi_ops.permute(x, m, s), [r(3, 4)], [COLUMNS], PLAN[:2],
        COLUMNS,
    ),
    "unpermute": (
        lambda y, w, m, s: torch.ops.kimi_ops.unpermute(y, m, s, w), [r(6, 4), r(3, 2)],
        [COLUMNS, WHOLE], PLAN[:2], COLUMNS,
    ),
    "sort_chunks": (kimi_ops.sort_chunks, [r(6, 4)], [COLUMNS], [SIZES, ORDER], COLUMNS),
    "columns": (
        lambda a, b, c, e: kimi_ops.grouped_gemm(a, b, e, bias=c),
        [r(6, 4), r(3, 4, 8), r(3, 8)], [WHOLE, LAST, COLUMNS], [ENDS], COLUMNS,
    ),
    "depth": (
        lambda a, b, e: kimi_ops.grouped_gemm(a, b, e), [r(6, 4), r(3, 4, 8)],
        [COLUMNS, COLUMNS], [ENDS], Partial(),
    ),
    "depth with a bias": (
        lambda a, b, c, e: kimi_ops.grouped_gemm(a, b, e, bias=c),
        [r(6, 4), r(3, 4, 8), r(3, 8)], [COLUMNS, COLUMNS, WHOLE], [ENDS], None,
    ),
    "wgrad": (
        kimi_ops.grouped_gemm_wgrad, [r(6, 4), r(6, 8)], [WHOLE, COLUMNS], [ENDS], LAST,
    ),
    "fused_experts": (
        kimi_ops.fused_experts, [r(3, 4), r(3, 8, 4), r(3, 4, 4), r(3, 2)],
        [ROWS, LAST, COLUMNS, WHOLE], [IDS], WHOLE,
    ),
    "topk_gate_given": (
        lambda z, ids: kimi_ops.topk_gate(z, ids=ids).weights, [r(4, 6)], [ROWS], [CHOSEN],
        ROWS,
    ),
    "z_loss": (kimi_ops.z_loss, [r(4, 6)], [ROWS], [], WHOLE),
}  # fmt: skip


def on_two_ranks(rank: int, folder: str) -> None:
    dtensor.register()
    dtensor.register()
    mesh = init_device_mesh("cpu", (2,))
    for name, (function, inputs, places, beside, lies) in CASES.items():
        whole = [x.clone().requires_grad_() for x in inputs]
        expected = function(*whole, *beside)
        parts = [
            distribute_tensor(x, mesh, [place]).requires_grad_()
            for x, place in zip(inputs, places, strict=True)
        ]
        y = function(*parts, *(distribute_tensor(x, mesh, [WHOLE]) for x in beside))
        assert isinstance(y, DTensor), name
        assert lies is None or y.placements == (lies,), f"{name}: {y.placements}"
        torch.testing.assert_close(y.full_tensor(), expected, msg=name)
        if not expected.is_floating_point():
            continue
        dy = torch.arange(expected.numel(), dtype=torch.float32).view(expected.shape)
        gradients = torch.autograd.grad(y.redistribute(mesh, [WHOLE]), parts,
                                        distribute_tensor(dy, mesh, [WHOLE]))  # fmt: skip
        for mine, other in zip(gradients, torch.autograd.grad(expected, whole, dy), strict=True):
            torch.testing.assert_close(mine.full_tensor(), other, msg=f"d {name}")


def test_parts_give_what_the_whole_gives(tmp_path: Path):
    launch(on_two_ranks, tmp_path, 2)


@pytest.mark.parametrize("name", [*dtensor.RULES, *dtensor.WHOLE])
def test_rules_are_of_operators_and_their_arguments(name):
    assert name in operators()
    schema = getattr(torch.ops.kimi_ops, name).default._schema
    for inputs, outputs in dtensor.RULES.get(name, []):
        assert inputs.keys() <= {argument.name for argument in schema.arguments}
        assert len(outputs) == len(schema.returns)
