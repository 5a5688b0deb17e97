# SPDX-License-Identifier: MIT
"""QK-Clip: after it, the largest logit of every head is min(S, tau), and nothing else has moved."""

import math

import pytest
import torch

from kimi_ops import attention_max_logits, qk_clip_
from kimi_ops.reference import qk_clip as reference

HEADS, NOPE, ROPE, V = 6, 4, 2, 3


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def full_maxima(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """The definition, with the whole score matrix."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if causal:
        visible = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.amax(dim=(0, 2, 3))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads"), [(1, 1, 2, 2), (300, 300, 2, 2), (129, 300, 4, 2)]
)
def test_max_logits_against_the_definition(queries, keys, heads, kv_heads, causal):
    q, k = rand(2, heads, queries, 8, seed=1), rand(2, kv_heads, keys, 8, seed=2)
    out = attention_max_logits(q, k, 0.3, causal=causal)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, full_maxima(q, k, 0.3, causal), rtol=1e-12, atol=0)
    low = attention_max_logits(q.bfloat16(), k.bfloat16(), 0.3, causal=causal)
    assert low.dtype == torch.float32
    exact = full_maxima(q.bfloat16().double(), k.bfloat16().double(), 0.3, causal)
    torch.testing.assert_close(low.double(), exact, rtol=1e-6, atol=0)


def test_max_logits_sees_only_what_the_mask_shows():
    q = torch.ones(1, 1, 4, 2)
    k = torch.full((1, 1, 4, 2), -1.0)
    k[0, 0, 3] = 5.0  # visible from the last query alone
    q[0, 0, 3] = 0.0
    assert attention_max_logits(q, k, 1.0).item() == 0.0
    assert attention_max_logits(q, k, 1.0, causal=False).item() == 10.0


def test_max_logits_edges():
    assert attention_max_logits(torch.ones(0, 3, 2, 2), torch.ones(0, 3, 2, 2), 1.0).tolist() == (
        [-math.inf] * 3
    )
    q = torch.ones(1, 2, 2, 2)
    q[0, 1, 1, 0] = math.nan
    out = attention_max_logits(q, torch.ones(1, 2, 2, 2), 1.0)
    assert out[0] == 2.0 and torch.isnan(out[1])
    q = torch.ones(1, 1, 2, 2, requires_grad=True)
    assert not attention_max_logits(q, q, 1.0).requires_grad


def mla_logits(x, rope_key, q_weight, k_weight):
    """Scores of MLA with a shared rotary key: [B, heads, S, S] without a scale, and the values."""
    q = (x @ q_weight.T).unflatten(-1, (HEADS, NOPE + ROPE)).transpose(1, 2)
    kv = (x @ k_weight.T).unflatten(-1, (HEADS, NOPE + V)).transpose(1, 2)
    k = torch.cat([kv[..., :NOPE], rope_key[:, None].expand(-1, HEADS, -1, -1)], dim=-1)
    return q, k, kv[..., NOPE:]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_mla_brings_every_head_to_min_of_s_and_tau(alpha: float):
    x, rope_key = rand(2, 20, 10, seed=3), rand(2, 20, ROPE, seed=4)
    q_weight, k_weight = (
        rand(HEADS * (NOPE + ROPE), 10, seed=5),
        rand(HEADS * (NOPE + V), 10, seed=6),
    )
    q_weight *= torch.linspace(0.1, 3, HEADS).repeat_interleave(NOPE + ROPE)[:, None]
    q, k, values = mla_logits(x, rope_key, q_weight, k_weight)
    before = attention_max_logits(q, k, 0.2)
    tau = float(before.median())
    old_q, old_k = q_weight.clone(), k_weight.clone()
    gamma = qk_clip_(
        before,
        q_weight=q_weight,
        k_weight=k_weight,
        tau=tau,
        alpha=alpha,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=V,
    )
    q, k, new_values = mla_logits(x, rope_key, q_weight, k_weight)
    after = full_maxima(q, k, 0.2, True)
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-12, atol=0)
    assert torch.equal(new_values, values)
    assert (gamma < 1).any() and (gamma == 1).any()
    for head in range(HEADS):
        if gamma[head] == 1:
            rows = slice(head * (NOPE + ROPE), (head + 1) * (NOPE + ROPE))
            assert torch.equal(q_weight[rows], old_q[rows])
            rows = slice(head * (NOPE + V), (head + 1) * (NOPE + V))
            assert torch.equal(k_weight[rows], old_k[rows])


@pytest.mark.parametrize(
    ("layout", "kv_heads", "mode"),
    [("mha", 6, "query_only"), ("gqa", 2, "query_only"), ("gqa", 2, "group_max")],
)
def test_mha_and_gqa(layout: str, kv_heads: int, mode: str):
    x, dim = rand(2, 15, 10, seed=7), 4
    q_weight, k_weight = rand(HEADS * dim, 10, seed=8), rand(kv_heads * dim, 10, seed=9)

    def maxima():
        q = (x @ q_weight.T).unflatten(-1, (HEADS, dim)).transpose(1, 2)
        k = (x @ k_weight.T).unflatten(-1, (kv_heads, dim)).transpose(1, 2)
        return full_maxima(q, k, 0.5, True)

    before = maxima()
    tau = float(before.median())
    old_k = k_weight.clone()
    gamma = qk_clip_(
        before,
        q_weight=q_weight,
        k_weight=k_weight,
        tau=tau,
        layout=layout,
        head_dim=dim,
        num_kv_heads=kv_heads,
        gqa_mode=mode,
    )
    torch.testing.assert_close(maxima(), before * gamma, rtol=1e-12, atol=0)
    if mode == "group_max":
        assert (maxima() <= tau * (1 + 1e-12)).all()
        group = gamma.reshape(kv_heads, -1)
        assert torch.equal(group.amin(1), group.amax(1))
    else:
        torch.testing.assert_close(maxima(), before.clamp(max=tau), rtol=1e-12, atol=0)
        assert torch.equal(k_weight, old_k) == (layout == "gqa")


def test_non_positive_and_non_finite_maxima_leave_their_heads_alone():
    q_weight, k_weight = rand(5 * 2, 3, seed=1), rand(5 * 2, 3, seed=2)
    old = q_weight.clone()
    values = torch.tensor([-5.0, 0.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
    gamma = qk_clip_(
        values, q_weight=q_weight, k_weight=k_weight, tau=1.0, layout="mha", head_dim=2
    )
    assert gamma.tolist() == [1.0] * 5 and torch.equal(q_weight, old)


def test_master_and_bf16_copy_are_both_scaled():
    master = rand(4, 3, seed=1, dtype=torch.float32)
    low = master.bfloat16()
    expected = (low.float() * 0.5).bfloat16()
    qk_clip_(
        torch.tensor([1.0, 4.0]),
        q_weight=[master, low],
        k_weight=torch.ones(4, 3),
        tau=1.0,
        layout="mha",
        head_dim=2,
    )
    assert torch.equal(low[2:], expected[2:]) and torch.equal(
        low[:2].float(), master[:2].bfloat16().float()
    )


MLA = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tau": 0.0}, "tau"),
        ({"alpha": 1.5}, "alpha"),
        ({"layout": "mqa"}, "layout"),
        ({"num_heads": 5}, "max_logits"),
        ({"v_head_dim": 5}, "k_weight"),
        ({"qk_rope_head_dim": None}, "qk_rope_head_dim"),
        ({"layout": "gqa", "head_dim": 6, "num_kv_heads": 4}, "divisor"),
    ],
)
def test_bad_geometry_changes_nothing(change: dict, text: str):
    q_weight, k_weight = rand(36, 5, seed=1), rand(42, 5, seed=2)
    old_q, old_k = q_weight.clone(), k_weight.clone()
    with pytest.raises(ValueError, match=text):
        qk_clip_(
            torch.full((6,), 1e6), **{"q_weight": q_weight, "k_weight": k_weight, **MLA, **change}
        )
    assert torch.equal(q_weight, old_q) and torch.equal(k_weight, old_k)


def test_wrong_types():
    with pytest.raises(TypeError, match="max_logits"):
        qk_clip_(
            torch.ones(2, dtype=torch.int32), q_weight=torch.ones(2, 2), k_weight=torch.ones(2, 2)
        )
    with pytest.raises(TypeError, match="q: expected"):
        attention_max_logits(torch.ones(1, 1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1), 1.0)
    with pytest.raises(TypeError, match="dtype"):
        attention_max_logits(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1).double(), 1.0)
    for q, k, scale in [
        (torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1), 1.0),
        (torch.ones(1, 3, 1, 1), torch.ones(1, 2, 1, 1), 1.0),
        (torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 2), 1.0),
        (torch.ones(1, 2, 3, 1), torch.ones(1, 2, 2, 1), 1.0),
        (torch.ones(1, 2, 3, 1), torch.ones(1, 2, 3, 1), 0.0),
    ]:
        with pytest.raises(ValueError, match="attention_max_logits"):
            attention_max_logits(q, k, scale)


@pytest.mark.parametrize("native", [True, False])
def test_autocast_does_not_round_the_logits(native, monkeypatch):
    q, k = torch.randn(2, 1, 4, 30, 24).mul(9).bfloat16()
    if not native:  # what CUDA tensors take
        monkeypatch.setattr(
            "kimi_ops.optim.engine.attention_max_logits",
            reference.attention_max_logits,
        )
    want = attention_max_logits(q, k, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_max_logits(q, k, 0.2)
    assert got.dtype == torch.float32 and torch.equal(got, want)
