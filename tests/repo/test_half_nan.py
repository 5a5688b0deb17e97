# SPDX-License-Identifier: MIT
"""A NaN that a CPU engine writes in fp16 has one form, 0x7e00 and its sign, whatever its payload:
whole vectors, the columns behind them and every instruction set agree."""

import pytest
import torch
from torch import Tensor

import kimi_ops
from kimi_ops.operators import muon_clip, qk_clip

COLUMNS = 300 + 19  # whole vectors and blocks, and columns behind them
PAYLOADS = (0x7E55, 0x7FFF, 0x7C01)  # quiet, quiet with every bit, signalling


def nans(*shape: int) -> Tensor:
    """[..., C] fp16 NaNs of every payload and both signs."""
    bits = torch.tensor([sign | payload for payload in PAYLOADS for sign in (0, 0x8000)])
    count = torch.Size(shape).numel()
    filled = bits.repeat(count // len(bits) + 1)[:count].to(torch.int32).to(torch.int16)
    return filled.view(torch.float16).reshape(shape)


def assert_one_form(x: Tensor) -> None:
    assert x.dtype == torch.float16
    found = (x.detach().contiguous().view(torch.int16).int() & 0x7FFF).unique().tolist()
    assert found == [0x7E00], [hex(bits) for bits in found]


def one_row_each(experts: int) -> kimi_ops.PermutePlan:
    return kimi_ops.permute_plan(torch.arange(experts, dtype=torch.int32)[:, None], experts)


def test_unpermute(cpu_engine):
    y, plan = nans(3, COLUMNS).requires_grad_(), one_row_each(3)
    weights = torch.full((3, 1), -0.5).requires_grad_()
    x = kimi_ops.unpermute(y, plan, weights)
    assert_one_form(x)
    assert_one_form(kimi_ops.unpermute(y, plan))
    dy, _ = torch.autograd.grad(x, (y, weights), nans(3, COLUMNS))
    assert_one_form(dy)


def test_products(cpu_engine):
    a, b, offsets = torch.ones(5, 7).half(), torch.ones(1, 7, COLUMNS).half(), torch.tensor([5])
    offsets = offsets.int()
    assert_one_form(kimi_ops.grouped_gemm(a, nans(1, 7, COLUMNS), offsets))
    assert_one_form(kimi_ops.grouped_gemm(nans(5, 7), b, offsets))
    assert_one_form(kimi_ops.grouped_gemm(a, b, offsets, bias=nans(1, COLUMNS)))
    assert_one_form(kimi_ops.grouped_gemm_wgrad(a, nans(5, COLUMNS), offsets))


@pytest.mark.parametrize("activation", ["silu", "gelu", "situ"])
def test_fused_experts(cpu_engine, activation):
    tokens, hidden, width = 5, COLUMNS, COLUMNS - 16
    x = nans(tokens, hidden).requires_grad_()
    gate_up = torch.ones(2, 2 * width, hidden).half().requires_grad_()
    down = torch.ones(2, hidden, width).half().requires_grad_()
    weights, ids = torch.ones(tokens, 2), torch.tensor([[0, 1]] * tokens, dtype=torch.int32)
    y = kimi_ops.fused_experts(x, gate_up, down, weights, ids, activation=activation)
    assert_one_form(y)
    for gradient in torch.autograd.grad(y, (x, gate_up, down), torch.ones_like(y)):
        assert_one_form(gradient)


def test_optimizer_passes(cpu_engine):
    n = COLUMNS
    param, buffer, moments = [nans(1, n)], [torch.zeros(1, n).half()], [torch.zeros(1, n)]
    muon_clip.muon_momentum_([nans(1, n)], buffer, 0.95, True, True, None, [])
    assert_one_form(buffer[0])
    muon_clip.muon_update_(param, [torch.zeros(1, n)], [0.02], 0.1, False, None, [], None, None)
    assert_one_form(param[0])
    param, squares, rates = [nans(1, n)], [torch.zeros(1, n)], (1e-2, 0.9, 0.95, 1e-8, 0.1)
    options = False, False, None, [], False, None, None, None
    steps = [torch.zeros(())]
    muon_clip.adamw_(param, [torch.ones(1, n)], moments, squares, steps, *rates, *options)
    assert_one_form(param[0])
    weight = nans(4, n)
    clip = [2, 1], [0, 2, 2, 0, 2, 0], [0.5], 100.0
    qk_clip.clip_rows_([weight], torch.tensor([150.0, 400.0]), *clip)
    assert_one_form(weight)


def test_newton_schulz(cpu_engine):
    assert_one_form(kimi_ops.syrk(nans(40, 45)))
    c = nans(1, 40).expand(40, 40).contiguous()
    assert_one_form(kimi_ops.syrk(torch.ones(40, 45).half(), c=torch.maximum(c, c.mT), beta=1.0))
