# SPDX-License-Identifier: MIT
"""QKClip over layers: grouped queries, masters, maxima that are not finite, the model's own
statistic."""

import math

import pytest
import torch
from torch import nn

from kimi_ops import MuonClip, QKClip, attention_max_logits, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config


class Grouped(nn.Module):
    """Attention with grouped queries, as QKClip needs it."""

    def __init__(self, heads: int, kv_heads: int, dim: int = 4, width: int = 10) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim
        self.q_proj = nn.Linear(width, heads * dim, bias=False, dtype=torch.float64)
        self.k_proj = nn.Linear(width, kv_heads * dim, bias=False, dtype=torch.float64)
        self.register_buffer("max_logits", torch.full((heads,), -math.inf, dtype=torch.float64))
        self.track_max_logits = False
        generator = torch.Generator().manual_seed(heads + kv_heads)
        for weight in (self.q_proj.weight, self.k_proj.weight):
            weight.data.normal_(0.0, 0.3, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        largest = attention_max_logits(q, k, 0.5)
        if self.track_max_logits:
            self.max_logits.copy_(torch.maximum(self.max_logits, largest))
        return largest


def inputs(seed: int) -> torch.Tensor:
    return 3 * torch.randn(
        2, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize(
    ("kv_heads", "mode"), [(6, "query_only"), (2, "query_only"), (2, "group_max")]
)
def test_grouped_queries_over_micro_batches(kv_heads: int, mode: str):
    layers = [Grouped(6, kv_heads) for _ in range(2)]
    with torch.no_grad():  # heads of all sizes
        layers[0].q_proj.weight.mul_(torch.linspace(0.2, 2, 6).repeat_interleave(4)[:, None])
    clip = QKClip(layers, tau=1.0, gqa_mode=mode)
    before = torch.stack(
        [torch.stack([layer(inputs(seed)) for seed in (1, 2)]).amax(0) for layer in layers]
    )
    clip.tau = float(before.median())
    clip.step()
    assert torch.equal(clip.max_logits, before) and not clip.nonfinite.any()
    after = torch.stack(
        [torch.stack([layer(inputs(seed)) for seed in (1, 2)]).amax(0) for layer in layers]
    )
    assert (clip.gamma < 1).any() and (clip.gamma == 1).any()
    torch.testing.assert_close(after, before * clip.gamma, rtol=1e-12, atol=0)
    if mode == "query_only":
        torch.testing.assert_close(after, before.clamp(max=clip.tau), rtol=1e-12, atol=0)
    assert all(torch.equal(layer.max_logits, row) for layer, row in zip(layers, after, strict=True))


def test_maxima_that_are_not_finite_are_flagged_and_skipped():
    layer = Grouped(5, 5)
    clip = QKClip([layer], tau=1.0)
    weight = layer.q_proj.weight.detach().clone()
    layer.max_logits.copy_(torch.tensor([math.nan, math.inf, -math.inf, -3.0, 4.0]))
    clip.step()
    assert clip.nonfinite.tolist() == [[True, True, False, False, False]]
    assert clip.gamma.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.25]]
    assert torch.equal(layer.q_proj.weight[:16], weight[:16])
    torch.testing.assert_close(layer.q_proj.weight[16:], weight[16:] * 0.5, rtol=1e-15, atol=0)
    assert torch.isneginf(layer.max_logits).all()


def test_masters_are_scaled_beside_the_weights_they_stand_for():
    model = KimiK2(KimiK2Config.tiny(), dtype=torch.bfloat16)
    masters = {p: p.detach().float() + 1e-4 for p in model.parameters()}
    layer = model.attention_layers()[0]
    clip = QKClip(model.attention_layers(), tau=1.0, masters=masters)
    low, high = layer.q_b_proj.weight.detach().clone(), masters[layer.q_b_proj.weight].clone()
    layer.max_logits.copy_(torch.tensor([0.5, 4.0]))
    clip.step()
    rows = slice(24, 40)  # the second head's position-free rows
    assert torch.equal(layer.q_b_proj.weight[rows], low[rows] * 0.5)
    assert torch.equal(masters[layer.q_b_proj.weight][rows], high[rows] * 0.5)
    assert torch.equal(masters[layer.q_b_proj.weight][:24], high[:24])


def test_a_model_stays_at_tau_after_the_update():
    """The maxima of the same batch, seen again after the step with a learning rate of zero."""
    model = KimiK2(KimiK2Config.tiny())
    with torch.no_grad():
        for layer in model.attention_layers():
            layer.q_b_proj.weight.mul_(40)
            layer.kv_b_proj.weight.mul_(40)
    clip = QKClip(model.attention_layers(), tau=1.0)
    optimizer = MuonClip(muon_param_groups(model), lr=0.0, qk_clip=clip)
    ids = torch.arange(48).reshape(2, 24) % 61

    def see() -> None:
        for half in ids.split(1):  # micro-batches
            model(half).sum().backward()

    see()
    clip.tau = float(torch.stack([a.max_logits for a in model.attention_layers()]).median())
    # later layers see other inputs once earlier ones attend otherwise: only the first is exact
    before = model.attention_layers()[0].max_logits.clone()
    assert (before > clip.tau).any()
    optimizer.step()
    see()
    after = model.attention_layers()[0].max_logits
    torch.testing.assert_close(after, before.clamp(max=clip.tau), rtol=1e-5, atol=0)


def test_bad_layers():
    with pytest.raises(ValueError, match="one number of heads"):
        QKClip([Grouped(4, 2), Grouped(6, 2)])
    with pytest.raises(ValueError, match="alpha"):
        QKClip([Grouped(4, 2)], alpha=2.0)
    with pytest.raises(ValueError, match="gqa_mode"):
        QKClip([Grouped(4, 2)], gqa_mode="mean")
    layer = Grouped(4, 2)
    del layer.num_kv_heads
    with pytest.raises(TypeError, match="num_kv_heads"):
        QKClip([layer])
