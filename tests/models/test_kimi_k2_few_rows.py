# SPDX-License-Identifier: MIT
"""Dense products in decode: few rows of bf16 on the CPU read each weight once, as it lies."""

import pytest
import torch
from rounding import error
from torch import nn

import kimi_ops
from benchmarks.measure import peak_memory
from kimi_ops import set_batch_invariant
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, LatentCache, few_rows
from kimi_ops.models.kimi_k2.layers import Linear

HALF_ULP = 2.0**-9  # of a result rounded to bf16 once


@pytest.fixture
def served(monkeypatch):
    """How often the product of few rows was taken."""
    taken = []

    def product(*arguments, **options):
        taken.append(arguments[0].shape)
        return kimi_ops.grouped_gemm(*arguments, **options)

    monkeypatch.setattr(few_rows, "grouped_gemm", product)
    return taken


def layer(bias=False, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return Linear(640, 512, bias=bias, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 2, 8, 12])
@pytest.mark.parametrize("bias", [False, True])
def test_one_rounding(served, rows, bias):
    linear = layer(bias)
    x = torch.randn(rows, 1, 640).bfloat16()
    exact = x.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0.0)
    with torch.no_grad():
        y = linear(x)
        assert y.shape == (rows, 1, 512) and y.dtype == torch.bfloat16
        assert len(served) == 1
        assert error(y, exact) < HALF_ULP
        strided = torch.randn(640, rows).bfloat16().t()
        assert error(linear(strided), nn.Linear.forward(linear, strided)) < 4 * HALF_ULP


def test_torch_computes_everything_else(served, monkeypatch):
    linear, x = layer(), torch.randn(2, 640).bfloat16()
    linear(x).sum().backward()
    with torch.no_grad():
        linear(torch.randn(13, 640).bfloat16())
        linear(x[:0])
        layer(dtype=torch.float32)(x.float())
        Linear(64, 64, dtype=torch.bfloat16)(x[:, :64])
        torch.compile(linear, backend="eager", fullgraph=True)(x)
        torch.func.vmap(linear)(x)
        with set_batch_invariant(True):
            expected = nn.functional.linear(x, linear.weight)
            assert torch.equal(linear(x), expected)
        with torch.device("meta"):
            assert layer()(torch.randn(2, 640).bfloat16()).is_meta
        monkeypatch.setattr(few_rows._native.engine, "cpu_engine", lambda op: "portable")
        linear(x)
    assert not served


def test_heads_of_several_sequences_copy_no_weights(served):
    stack = torch.randn(16, 256, 160).bfloat16()  # keys above values, as kv_b_proj holds them
    for weight in (stack[:, :128], stack[:, 128:].transpose(1, 2)):
        for batch, tokens in ((1, 1), (3, 2), (4, 5)):
            x = torch.randn(batch, tokens, 16, weight.shape[1]).bfloat16().transpose(1, 2)
            with torch.no_grad():
                y = few_rows.per_head(x, weight)
            exact = x.double() @ weight.double()
            assert y.shape == exact.shape and error(y, exact) < HALF_ULP
    assert len(served) == 4
    x = torch.randn(12, 16, 1, 128).bfloat16()
    with torch.no_grad():
        peak = peak_memory(lambda: few_rows.per_head(x, stack[:, :128]), "cpu")
    assert peak < 3 * stack.nbytes  # of copies twelve, of half of them


def test_a_decode_step(served, monkeypatch):
    monkeypatch.setattr(few_rows, "WORTH", 1)
    config = KimiK2Config.tiny()
    model = KimiK2(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))

    def step():
        cache = LatentCache(config, 3, 9, dtype=torch.bfloat16)
        with torch.no_grad():
            model(ids[:, :8], cache=cache)
            served.clear()
            return model(ids[:, 8:], cache=cache)

    logits = step()
    products = [m for m in model.modules() if isinstance(m, nn.Linear)]
    layers = config.num_hidden_layers
    # kv_b_proj is absorbed: two products of each head instead
    assert len(served) == len(products) - layers + 2 * layers
    monkeypatch.setattr(few_rows, "ROWS", 0)
    before = step()
    assert not served
    assert error(logits, before) < 0.03
