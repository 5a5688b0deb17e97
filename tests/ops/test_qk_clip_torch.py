# SPDX-License-Identifier: MIT
"""The native maxima and row scaling of QK-Clip: every engine against exact arithmetic, and the
operators as citizens of torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimi_ops import attention_max_logits, qk_clip_
from kimi_ops.reference.qk_clip import Layer, Rows
from kimi_ops.reference.qk_clip import attention_max_logits as twin
from kimi_ops.reference.qk_clip import clip_rows_ as twin_clip_rows_

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
    [(1, 1, 1, 1, 1, 1), (2, 4, 2, 33, 33, 16), (1, 2, 2, 20, 270, 192), (1, 2, 1, 530, 530, 8),
     (1, 1, 1, 3, 65, 530)],
)  # fmt: skip
def test_maxima_are_exact(gemm_engine, dtype, causal, sizes):
    if gemm_engine.slow and sizes[3] > 500:
        sizes = (1, 2, 1, 135, 300, 8)
    q, k = pair(*sizes, dtype)
    exact = twin(q.double(), k.double(), 0.5, causal).float()
    assert torch.equal(attention_max_logits(q, k, 0.5, causal=causal), exact)
    if gemm_engine.slow and causal:
        return
    dense = attention_max_logits(q.contiguous(), k.contiguous(), 0.5, causal=causal)
    columns = attention_max_logits(q.mT.contiguous().mT, k.mT.contiguous().mT, 0.5, causal=causal)
    assert torch.equal(dense, exact) and torch.equal(columns, exact)


# Sums of up to 64 products of values below 5, in any order and as coarse as fp32: 1e-5 of 64 * 25.
@given(st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_shapes_and_strides(gemm_engine, dtype, data):
    def size(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    batch, kv_heads, group, dim = size(1, 2), size(1, 2), size(1, 3), size(1, 64)
    queries = size(1, 40 if gemm_engine.slow else 300)
    keys, causal = queries + size(0, 60), data.draw(st.booleans())

    def tensor(heads: int, rows: int) -> Tensor:
        order = data.draw(st.permutations(range(4)))
        shape = [(batch, heads, rows, dim)[i] for i in order]
        shape[-1] += (gap := data.draw(st.sampled_from([0, 0, 3, 8])))
        x = torch.randn(shape).clamp(-5, 5).to(dtype)[..., gap:]
        return x.permute([order.index(i) for i in range(4)])

    q, k = tensor(kv_heads * group, queries), tensor(kv_heads, keys)
    exact = twin(q.double(), k.double(), 0.25, causal)
    got = attention_max_logits(q, k, 0.25, causal=causal)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.25 * 64 * 25 * 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_values_against_attention_scores(gemm_engine, dtype, two_thread_counts):
    tokens, repeats = (70, 1) if gemm_engine.slow else (150, 10)
    q, k = torch.randn(2, 3, tokens, 40).to(dtype), torch.randn(2, 3, tokens, 40).to(dtype)
    weights = torch.eye(tokens).expand(2, 3, tokens, tokens).to(torch.float64)
    probabilities = F.scaled_dot_product_attention(
        q.double(), k.double(), weights, is_causal=True, scale=0.3
    )
    logits = (0.3 * q.double() @ k.double().mT).masked_fill(probabilities == 0, -torch.inf)
    exact = logits.amax(dim=(0, 2, 3)).float()
    results = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        results += [attention_max_logits(q, k, 0.3) for _ in range(repeats)]
    torch.testing.assert_close(results[0], exact, rtol=1e-5, atol=0)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nothing_visible_nan_and_infinity(gemm_engine):
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


MAXIMA = [90.0, 400.0, 101.0, torch.nan, 150.0, -torch.inf, torch.inf, 3e38, 120.0]
LAYERS = [Layer(3), Layer(6, 2)]


def clipped(dtype: torch.dtype, cols: int) -> tuple[list[Tensor], list[Rows], list[float]]:
    """A weight with its bias, an fp32 copy, one whose rows begin within a head, a strided one."""
    weight, shard = torch.randn(15, cols + 3).to(dtype)[:, :cols], torch.randn(7, cols).to(dtype)
    weights = [weight.contiguous(), torch.randn(15).to(dtype), weight.float(), weight, shard,
               torch.randn(cols, 6).to(dtype).mT]  # fmt: skip
    of = [Rows(0, 3, 5, 0, 2, 1)] * 4 + [Rows(1, 3, 4, 2, 3, 1), Rows(1, 6, 1, 0, 0, 1)]
    return weights, of, [0.5, 0.5, 0.3, 0.0, 0.75, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_rows_have_the_bits_of_the_twin(gemm_engine, dtype):
    maxima = torch.tensor(MAXIMA)
    for cols in (1, 37, 400):
        weights, rows, powers = clipped(dtype, cols)
        ours, theirs = [w.clone() for w in weights], [w.clone() for w in weights]
        ours[3] = torch.empty(15, cols + 3, dtype=dtype)[:, :cols].copy_(weights[3])
        versions = [w._version for w in ours]
        numbers = [[n for entry in entries for n in entry] for entries in (LAYERS, rows)]
        gamma = ops.clip_rows_(ours, maxima, *numbers, powers, 100.0)
        assert all(w._version > version for w, version in zip(ours, versions, strict=True))
        assert torch.equal(gamma, twin_clip_rows_(theirs, maxima, LAYERS, rows, powers, 100.0))
        assert torch.equal(gamma, torch.tensor([1.0, 0.25, *gamma[2:].tolist()]))
        assert gamma[3] == gamma[4] < 1 and gamma[5] == gamma[6] == 1 and gamma[7] == gamma[8] < 1
        for number, (got, want) in enumerate(zip(ours, theirs, strict=True)):
            # gamma^0.3 in fp64 or fp32: an ulp, half of one more when it is rounded to 16 bits
            bits = powers[number] in (0.0, 0.5, 1.0)
            same = dict(rtol=0, atol=0) if bits else dict(rtol=2**-7, atol=0)
            torch.testing.assert_close(got, want, **same)
            if dtype == torch.float32:
                torch.testing.assert_close(got, want, rtol=3e-7, atol=0)


def test_heads_under_tau_keep_every_bit(gemm_engine):
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
    weights, maxima = [torch.randn(6, 5), torch.randn(6)], torch.tensor([300.0, 20.0, 400.0])
    numbers = [3, 1], [0, 3, 2, 0, 1, 1] * 2, [0.5, 0.5], 100.0
    torch.library.opcheck(ops.clip_rows_.default, (weights, maxima, *numbers))


def test_compile_full_graph_with_dynamic_sizes():
    torch._dynamo.reset()

    def largest(q: Tensor, k: Tensor) -> Tensor:
        return attention_max_logits(q, k, 0.5) + 1

    compiled = torch.compile(largest, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 17, 40):
        q, k = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
        assert torch.equal(compiled(q, k), largest(q, k))


Q = torch.ones(1, 2, 3, 4)


def clip(**changes: object) -> Tensor:
    good = {"weights": [torch.ones(4, 3)], "max_logits": torch.ones(2), "layers": [2, 1],
            "geometry": [0, 2, 2, 0, 1, 1], "powers": [0.5], "tau": 100.0}  # fmt: skip
    return ops.clip_rows_(**(good | changes))


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
        (ValueError, r"clip_rows: max_logits: expected shape \[3\], got \[2\]",
         lambda: clip(layers=[3, 1])),
        (ValueError, "clip_rows: layers: expected 1 head or more in groups of a divisor of them, "
         "got 2 in groups of 3", lambda: clip(layers=[2, 3])),
        (ValueError, "clip_rows: blocks: expected a divisor of 2 heads, got 3",
         lambda: clip(geometry=[0, 3, 2, 0, 1, 1])),
        (ValueError, "clip_rows: shared, whole: expected rows within the 2 of a head, got 1 and 2",
         lambda: clip(geometry=[0, 2, 2, 0, 1, 2])),
        (ValueError, "clip_rows: rows: expected at most 4 for 2 heads of 2, got 4 from 1 on",
         lambda: clip(geometry=[0, 2, 2, 1, 1, 1])),
        (ValueError, "clip_rows: layer: expected 0..0, got 1",
         lambda: clip(geometry=[1, 2, 2, 0, 1, 1])),
        (ValueError, "clip_rows: geometry, powers: expected 6 numbers and one a weight, got 5",
         lambda: clip(geometry=[0, 2, 2, 0, 1])),
        (ValueError, "clip_rows: power: expected 0 to 1, got 2", lambda: clip(powers=[2.0])),
        (ValueError, "clip_rows: tau: expected a finite number, got nan",
         lambda: clip(tau=torch.nan)),
        (TypeError, "clip_rows: max_logits: expected float32, got float64",
         lambda: clip(max_logits=torch.ones(2).double())),
    ],
)  # fmt: skip
def test_bad_input_names_argument_and_cure(error, text, call):
    with pytest.raises(error, match=text):
        call()
