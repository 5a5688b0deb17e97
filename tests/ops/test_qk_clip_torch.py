# SPDX-License-Identifier: MIT
"""The native maxima and row scaling of QK-Clip: every engine against exact arithmetic, and the
operators as citizens of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import attention_max_logits, qk_clip_
from kimi_ops.reference.qk_clip import attention_max_logits as twin
from kimi_ops.reference.qk_clip import scale_rows_ as twin_scale_rows_

ops = torch.ops.kimi_ops
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pair(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Integers, whose products are exact; heads beside each other, as projections leave them."""
    q = torch.randint(-3, 4, (batch, queries, heads, dim)).to(dtype).transpose(1, 2)
    k = torch.randint(-3, 4, (batch, keys, kv_heads, dim)).to(dtype).transpose(1, 2)
    return q, k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1, 1), (2, 4, 2, 33, 33, 16), (1, 2, 2, 100, 300, 192), (1, 2, 1, 530, 530, 8),
     (1, 1, 1, 3, 65, 530)],
)  # fmt: skip
def test_maxima_are_exact(cpu_engine, dtype, causal, sizes):
    q, k = pair(*sizes, dtype)
    exact = twin(q.double(), k.double(), 0.5, causal).float()
    assert torch.equal(attention_max_logits(q, k, 0.5, causal=causal), exact)
    dense = attention_max_logits(q.contiguous(), k.contiguous(), 0.5, causal=causal)
    columns = attention_max_logits(q.mT.contiguous().mT, k.mT.contiguous().mT, 0.5, causal=causal)
    assert torch.equal(dense, exact) and torch.equal(columns, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_values_against_attention_scores(cpu_engine, dtype, two_thread_counts):
    q, k = torch.randn(2, 3, 150, 40).to(dtype), torch.randn(2, 3, 150, 40).to(dtype)
    weights = torch.eye(150).expand(2, 3, 150, 150).to(torch.float64)
    probabilities = F.scaled_dot_product_attention(
        q.double(), k.double(), weights, is_causal=True, scale=0.3
    )
    logits = (0.3 * q.double() @ k.double().mT).masked_fill(probabilities == 0, -torch.inf)
    exact = logits.amax(dim=(0, 2, 3)).float()
    results = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        results += [attention_max_logits(q, k, 0.3) for _ in range(10)]
    torch.testing.assert_close(results[0], exact, rtol=1e-5, atol=0)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nothing_visible_nan_and_infinity(cpu_engine):
    q, k = pair(1, 2, 2, 40, 40, 8, torch.bfloat16)
    assert attention_max_logits(q[:, :, :0], k, 1.0).tolist() == [-torch.inf] * 2
    assert attention_max_logits(q[:, :, :, :0], k[:, :, :, :0], 1.0).tolist() == [0, 0]
    k[0, 1, 39, 0] = torch.nan
    largest = attention_max_logits(q, k, 1.0)
    assert torch.isfinite(largest[0]) and largest[1].isnan()
    assert torch.isfinite(attention_max_logits(q[:, :, :39], k[:, :, :39], 1.0)).all()
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    k[0, 0, 1, 0] = torch.inf
    assert attention_max_logits(q, k, 1.0).tolist() == [torch.inf]
    assert attention_max_logits(-q, k.abs(), 1.0).tolist() == [-4.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_rows_have_the_bits_of_the_twin(cpu_engine, dtype):
    factors = torch.tensor([0.3, 1.0, 0.7])
    for cols in (1, 37, 1000):
        weight = torch.randn(15, cols + 3).to(dtype)[:, :cols]
        for strided in (weight, weight.contiguous(), weight.mT.contiguous().mT):
            ours, theirs = strided.clone(), strided.clone()
            view = torch.empty(15, cols + 3, dtype=dtype)[:, :cols].copy_(strided)
            version = ours._version
            ops.scale_rows_(ours, factors, 1, 4)
            ops.scale_rows_(view, factors, 1, 4)
            twin_scale_rows_(theirs, 3, 1, 4, factors)
            assert torch.equal(ours, theirs) and torch.equal(view, theirs)
            assert ours._version > version


def test_heads_under_tau_keep_every_bit(cpu_engine):
    odd = torch.tensor([0x7F81, 0xFF91, 0x0001, 0x8000], dtype=torch.int32).to(torch.int16)
    query = torch.randn(4, 4).bfloat16()
    query[2:] = odd.view(torch.bfloat16)  # NaNs with payloads, a subnormal, -0
    key = query.clone()
    gamma = qk_clip_(
        torch.tensor([400.0, 99.0]), q_weight=query, k_weight=key, layout="mha", head_dim=2
    )
    assert gamma.tolist() == [0.25, 1.0]
    assert torch.equal(query[2:].view(torch.int16), odd.expand(2, 4))
    assert torch.equal(key[2:].view(torch.int16), odd.expand(2, 4))


def test_opcheck():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    torch.library.opcheck(ops.attention_max_logits.default, (q, k, 0.5, True))
    torch.library.opcheck(ops.scale_rows_.default, (torch.randn(6, 5), torch.rand(3), 0, 1))


def test_compile_full_graph_with_dynamic_sizes():
    torch._dynamo.reset()

    def largest(q: Tensor, k: Tensor) -> Tensor:
        return attention_max_logits(q, k, 0.5) + 1

    compiled = torch.compile(largest, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 17, 40):
        q, k = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
        assert torch.equal(compiled(q, k), largest(q, k))


Q = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize(
    "error,text,call",
    [
        (TypeError, "attention_max_logits: q: expected float32, bfloat16, float16, got float64",
         lambda: ops.attention_max_logits(Q.double(), Q.double(), 1.0, True)),
        (ValueError, "attention_max_logits: kv_heads: expected a divisor of heads 2, got 3",
         lambda: ops.attention_max_logits(Q, torch.ones(1, 3, 3, 4), 1.0, True)),
        (ValueError, r"attention_max_logits: k: expected shape \[1, kv_heads, Sk, 4\]",
         lambda: ops.attention_max_logits(Q, torch.ones(1, 2, 3, 5), 1.0, True)),
        (ValueError, "attention_max_logits: scale: expected a positive finite number, got -1",
         lambda: ops.attention_max_logits(Q, Q, -1.0, True)),
        (ValueError, "attention_max_logits: queries: expected at most as many as keys",
         lambda: ops.attention_max_logits(Q, Q[:, :, :2], 1.0, True)),
        (ValueError, "scale_rows: first, last: expected rows within 0..2, got 1 and 3",
         lambda: ops.scale_rows_(torch.ones(4, 3), torch.ones(2), 1, 3)),
        (ValueError, "scale_rows: weight: expected rows for 3 heads, got 4",
         lambda: ops.scale_rows_(torch.ones(4, 3), torch.ones(3), 0, 1)),
        (TypeError, "scale_rows: factors: expected float32, got float64",
         lambda: ops.scale_rows_(torch.ones(4, 3), torch.ones(2).double(), 0, 1)),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match=text):
        call()
