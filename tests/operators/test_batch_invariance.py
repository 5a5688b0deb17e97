# SPDX-License-Identifier: MIT
"""A token has the same bits alone, among few and among many: always where docs/determinism.md says
so, for products of few rows on a CPU under `set_batch_invariant`."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import kimi_ops
from kimi_ops import (
    ExpertParallel,
    Fp8BlockWeight,
    Fp8Rows,
    Int4GroupWeight,
    LocalWorld,
    fused_experts,
    gate_plan,
    grouped_gemm,
    permute,
    permute_plan,
    set_batch_invariant,
    topk_gate,
    unpermute,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Alone; on both sides of every change of form: 6 and 20 rows of the dot products, panels of 12, 14
# and 16, tiles of 64 and 128
COMPANY = (1, 2, 6, 7, 13, 20, 21, 33, 65, 130)
FEW = (1, 2, 7, 65, 130)  # where every row is a fiber's


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def invariant():
    with set_batch_invariant(True):
        yield


@pytest.fixture
def products(gemm_engine):
    """`gemm_engine`; the flag is that of the module that serves it."""
    with set_batch_invariant(True):
        yield gemm_engine


@pytest.fixture
def stored_products(cpu_engine):
    """Quantised weights beside plain rows are the CPU's."""
    with set_batch_invariant(True):
        yield cpu_engine


def company(engine) -> tuple[int, ...]:
    return FEW if engine.slow else COMPANY


def depth(engine) -> int:
    """Beyond a panel of the CPU's and a ring of the GPU's."""
    return 320 if engine.slow else 1600


def first_row_of_each_group(a: Tensor, weights, rows: int, **options) -> Tensor:
    """Row 0 of `a` in front of `rows - 1` others, in the first group and in one behind it."""
    group = a[:rows]
    offsets = torch.tensor([rows, rows, 2 * rows], dtype=torch.int32)
    c = grouped_gemm(torch.cat((group, group)), weights, offsets, **options)
    return torch.stack((c[0], c[rows]))


def same(results: list[Tensor]) -> None:
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("rows_of_weights", [True, False], ids=["E,N,K", "E,K,N"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_product(products, dtype, rows_of_weights):
    engine = products
    a = torch.randn(max(COMPANY), depth(engine)).to(dtype)
    b = (torch.randn(3, 72, depth(engine)) / depth(engine) ** 0.5).to(dtype).transpose(1, 2)
    b = b if rows_of_weights else b.contiguous()
    same([first_row_of_each_group(a, b, n, out_dtype=torch.float32) for n in company(engine)])


@pytest.mark.parametrize("stored", [Fp8BlockWeight, Int4GroupWeight])
def test_a_row_of_a_product_with_stored_weights(stored_products, stored):
    engine = stored_products
    a = torch.randn(max(COMPANY), 512).bfloat16()
    weights = stored.quantize(torch.randn(3, 72, 512) / 16)
    same([first_row_of_each_group(a, weights, n) for n in company(engine)])


@pytest.mark.filterwarnings("ignore:.*dequantised to bfloat16")
def test_a_row_of_a_product_of_fp8_rows(products):
    engine = products
    a = torch.randn(max(COMPANY), 512)
    weights = Fp8BlockWeight.quantize(torch.randn(3, 72, 512) / 16)
    results = []
    for n in company(engine):
        rows = Fp8Rows.quantize(torch.cat((a[:n], a[:n])))
        c = grouped_gemm(rows, weights, torch.tensor([n, n, 2 * n], dtype=torch.int32))
        results.append(torch.stack((c[0], c[n])))
    same(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_of_the_experts_and_its_gradients(products, dtype):
    engine = products
    tokens, hidden, inner, experts, k = max(company(engine)), 64, depth(engine) // 4, 5, 2
    x = torch.randn(tokens, hidden).to(dtype)
    w_gate_up = (torch.randn(experts, 2 * inner, hidden) / 8).to(dtype)
    w_down = (torch.randn(experts, hidden, inner) / inner**0.5).to(dtype)
    weights = torch.rand(tokens, k)
    indices = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()
    dy = torch.randn(tokens, hidden).to(dtype)
    results = []
    for n in company(engine):
        own_x, own_weights = x[:n].requires_grad_(), weights[:n].requires_grad_()
        y = fused_experts(own_x, w_gate_up, w_down, own_weights, indices[:n])
        dx, dw = torch.autograd.grad(y, (own_x, own_weights), dy[:n])
        results.append(torch.cat((y[0].float(), dx[0].float(), dw[0])))
    same(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_a_token_of_the_router(engine, dtype, score_function):
    """Whether or not the flag is set; in one launch with the plan for some numbers of tokens."""
    logits = torch.randn(130, 96, device=engine.device).to(dtype)
    results = []
    for n in (1, 2, 33, 64, 65, 130):
        for gate in (
            topk_gate(logits[:n], 6, score_function=score_function),
            gate_plan(logits[:n], 6, score_function=score_function)[0],
        ):
            results.append(torch.cat((gate.weights[0], gate.indices[0].float())))
    same(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_that_goes_out_and_comes_home(engine, dtype):
    """Whatever rows lie beside its own."""
    tokens, hidden, experts, k = 65, 264, 7, 3
    x = torch.randn(tokens, hidden, device=engine.device).to(dtype)
    weights = torch.rand(tokens, k, device=engine.device)
    indices = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()
    indices = indices.to(engine.device)
    results = []
    for n in (1, 2, 7, 65):
        plan = permute_plan(indices[:n], experts)
        rows = permute(x[:n], plan)
        torch.testing.assert_close(rows[plan.row_map[0].long()], x[:1].expand(k, -1))
        results.append(unpermute(rows * 3, plan, weights[:n])[0])
    same(results)


@pytest.mark.parametrize("layout", ["rank_dedup", "expert_direct"])
def test_a_token_that_other_ranks_compute(layout):
    """Home adds by rank or by slot, whoever else sent tokens."""
    tokens, hidden, experts, k, world = 9, 40, 8, 3, 2
    x, weights = torch.randn(world, tokens, hidden), torch.rand(world, tokens, k)
    indices = torch.stack([torch.randperm(experts)[:k] for _ in range(world * tokens)])
    indices = indices.view(world, tokens, k).int()

    def work(group, n):
        sizes = {"num_experts": experts, "hidden": hidden, "max_tokens_per_rank": tokens}
        with ExpertParallel(group, **sizes, layout=layout, backend="reference") as ep:
            mine = (x[group.rank, :n], indices[group.rank, :n], weights[group.rank, :n])
            d = ep.dispatch(*mine)
            return ep.combine(d.x * 1.5, d.handle)[0]

    same([torch.stack(LocalWorld(world).run(lambda group, n=n: work(group, n))) for n in (1, 4, 9)])


def test_few_rows_on_a_cpu_are_faster_by_another_order_without_it():
    """Else the flag would have nothing to do, here and in its page."""
    a, b = torch.randn(64, 1600), torch.randn(3, 72, 1600).transpose(1, 2)
    with set_batch_invariant(False):
        alone, among = (first_row_of_each_group(a, b, n) for n in (1, 64))
    assert not torch.equal(alone, among)


def test_the_block_ends_and_other_things_are_no_answer():
    before = kimi_ops.is_batch_invariant()
    with set_batch_invariant(not before):
        assert kimi_ops.is_batch_invariant() == (not before)
        assert kimi_ops.info()["cpu"]["batch_invariant"] == (not before)
    assert kimi_ops.is_batch_invariant() == before
    again = set_batch_invariant(not before)
    for _ in range(2):
        with again:
            assert kimi_ops.is_batch_invariant() == (not before)
        assert kimi_ops.is_batch_invariant() == before
    for wrong in ("0", 1, None):
        with pytest.raises(TypeError, match="set_batch_invariant: enabled: expected a bool"):
            set_batch_invariant(wrong)
    assert kimi_ops.is_batch_invariant() == before


@pytest.mark.parametrize(
    ("value", "expected", "said"),
    [("1", True, ""), ("0", False, ""), ("", False, ""), ("yes", True, "expected 0 or 1")],
)
def test_the_environment_decides_at_first(value, expected, said):
    code = "import kimi_ops; print(kimi_ops.is_batch_invariant())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KIMI_OPS_BATCH_INVARIANT": value},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(expected) and said in found.stderr, found
