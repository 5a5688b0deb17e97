# SPDX-License-Identifier: MIT
"""QKClip over layers: grouped queries, masters, maxima that are not finite, the model's own
statistic."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops import MuonClip, QKClip, attention_max_logits, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config


class Grouped(nn.Module):
    """Attention with grouped queries, as QKClip needs it."""

    def __init__(
        self, heads: int, kv_heads: int, bias: bool = False, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        dim, width = 4, 10
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim
        self.q_proj = nn.Linear(width, heads * dim, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(width, kv_heads * dim, bias=bias, dtype=dtype)
        self.register_buffer("max_logits", torch.full((heads,), -math.inf, dtype=dtype))
        self.track_max_logits = False
        generator = torch.Generator().manual_seed(heads + kv_heads)
        for parameter in self.parameters():
            parameter.data.normal_(0.0, 0.3, generator=generator)

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


@pytest.mark.parametrize("mode", ["query_only", "group_max"])
@pytest.mark.parametrize("kv_heads", [6, 3])
def test_biases_scale_with_their_rows(kv_heads: int, mode: str):
    layer = Grouped(6, kv_heads, bias=True)
    with torch.no_grad():
        layer.q_proj.bias.mul_(20)
        layer.k_proj.bias.mul_(20)
    clip = QKClip([layer], tau=1.0, gqa_mode=mode)
    for _ in range(3):
        before = layer(inputs(1)).detach()
        assert (before > 1).any() or (before <= 1 + 1e-12).all()
        clip.step()
        torch.testing.assert_close(layer(inputs(1)), before * clip.gamma[0], rtol=1e-12, atol=0)
    assert (before <= 1 + 1e-12).all() and layer.q_proj.weight.norm() > 0.01


def test_biases_of_latent_attention_scale_but_those_of_values_stay():
    layer, heads = nn.Module(), 2
    layer.q_proj, layer.kv_b_proj = nn.Linear(8, heads * 6), nn.Linear(8, heads * 7)
    layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim = 4, 2, 3
    layer.max_logits = torch.tensor([400.0, 50.0])
    old = {name: value.detach().clone() for name, value in layer.named_parameters()}
    QKClip([layer]).step()
    half, quarter = 0.5, 0.25
    for name, factors in (("q_proj", [half] * 4 + [quarter] * 2), ("kv_b_proj", [half] * 4)):
        want = old[f"{name}.bias"].clone()
        want[: len(factors)] *= torch.tensor(factors)
        assert torch.equal(getattr(layer, name).bias, want)
        assert torch.equal(getattr(layer, name).weight[:, 3] != old[f"{name}.weight"][:, 3],
                           want != old[f"{name}.bias"])  # fmt: skip


def test_layers_with_other_numbers_of_heads():
    layers = [Grouped(4, 2), Grouped(6, 6), Grouped(1, 1)]
    clip = QKClip(layers, tau=2.0)
    for layer, first in zip(layers, (4.0, 1.0, 8.0), strict=True):
        layer.max_logits.fill_(1.0)
        layer.max_logits[0] = first
    layers[0].max_logits[3] = math.nan
    old = [layer.q_proj.weight.detach().clone() for layer in layers]
    clip.step()
    none = -math.inf
    assert clip.max_logits.tolist() == [
        [4, 1, 1, math.inf, none, none], [1] * 6, [8, none, none, none, none, none]
    ]  # fmt: skip
    assert clip.gamma.tolist() == [[0.5] + [1] * 5, [1] * 6, [0.25] + [1] * 5]
    assert clip.nonfinite.tolist() == [[False] * 3 + [True] + [False] * 2, [False] * 6, [False] * 6]
    assert torch.equal(layers[0].q_proj.weight[:4], old[0][:4] / 2)
    assert torch.equal(layers[0].q_proj.weight[4:], old[0][4:])
    assert torch.equal(layers[1].q_proj.weight, old[1])
    assert torch.equal(layers[2].q_proj.weight, old[2] / 2)


def test_native_layers_on_every_engine(engine):
    layers = [Grouped(4, 2, True, torch.float32), Grouped(6, 6, False, torch.float32)]
    for layer in layers:
        layer.to(engine.device)
    clip = QKClip(layers, tau=2.0, gqa_mode="group_max")
    layers[0].max_logits.copy_(torch.tensor([8.0, 1.0, 1.0, 2.0]))
    layers[1].max_logits.copy_(torch.arange(6.0))
    twins = [copy.deepcopy(layer).double() for layer in layers]
    clip.step()
    QKClip(twins, tau=2.0, gqa_mode="group_max").step()
    assert clip.gamma[0].tolist() == [0.25, 0.25, 1, 1, 1, 1]
    for layer, twin in zip(layers, twins, strict=True):
        for got, want in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, want.float(), rtol=2e-7, atol=0)
        assert torch.isneginf(layer.max_logits).all()


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [[2, 2], [2] * 40])
def test_a_step_is_few_operations_whatever_the_number_of_layers(heads: list[int]):
    clip = QKClip([Grouped(n, n, True, torch.float32) for n in heads])
    with Counting() as counting:
        clip.step()
    launches = [name for name in counting.names if not re.search("view|split|detach|slice", name)]
    assert launches.count("kimi_ops.clip_rows_.default") == 1
    assert len(launches) <= 6, launches


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_changes_nothing(device: str):
    layers = [Grouped(4, 2), Grouped(6, 6)]
    clip = QKClip(layers, tau=1.0)
    for layer in layers:
        layer.max_logits.fill_(4.0)
    with torch.device(device):
        clip.step()
    assert clip.gamma[0, 0] == 0.25 and clip.gamma.device.type == "cpu"
    assert all(torch.isneginf(layer.max_logits).all() for layer in layers)


@pytest.mark.parametrize(
    "name", ["q_norm", "k_norm", "q_layernorm", "k_layernorm", "qk_norm", "query_norm", "norm_k"]
)
def test_normalised_queries_and_keys_are_refused(name: str):
    layer = Grouped(4, 2)
    for harmless in (None, False, nn.Identity()):
        setattr(layer, name, harmless)
        QKClip([layer])
        delattr(layer, name)
    setattr(layer, name, nn.LayerNorm(4))
    with pytest.raises(ValueError, match=f"QKClip: layers.1.: .* a Grouped with {name}"):
        QKClip([Grouped(4, 2), layer])


def test_norms_before_the_projections_of_latent_attention_are_fine():
    layer = KimiK2(KimiK2Config.tiny()).attention_layers()[0]
    assert layer.q_a_layernorm is not None and layer.kv_a_layernorm is not None
    QKClip([layer])
    layer.q_b_proj = nn.Linear(20, layer.q_b_proj.out_features)
    layer.q_norm = nn.RMSNorm(20)  # of the compressed query
    QKClip([layer])
    layer.q_norm = nn.RMSNorm(layer.qk_nope_head_dim + layer.qk_rope_head_dim)
    with pytest.raises(ValueError, match="q_norm"):
        QKClip([layer])


@pytest.mark.parametrize(
    "name", ["qkv_proj", "linear_qkv", "c_attn", "query_key_value", "Wqkv", "in_proj_weight"]
)
def test_fused_projections_are_refused(name: str):
    layer = nn.Module()
    setattr(layer, name, nn.Linear(4, 12))
    with pytest.raises(TypeError, match=f"QKClip: layers: .* a Module with {name}"):
        QKClip([layer])
    with pytest.raises(TypeError, match="a MultiheadAttention with in_proj_weight"):
        QKClip([nn.MultiheadAttention(8, 2)])


def test_a_projection_with_more_than_weight_and_bias_is_refused():
    layer = Grouped(4, 2)
    layer.q_proj.lora_A = nn.Linear(10, 2, bias=False)
    with pytest.raises(TypeError, match=r"layers.0..q_proj: .* a Linear with lora_A.weight"):
        QKClip([layer])
    layer.q_proj = nn.Identity()
    with pytest.raises(TypeError, match="a Identity with no weight"):
        QKClip([layer])


def test_weights_of_two_layers_are_refused():
    layers = [Grouped(4, 2), Grouped(4, 2)]
    with pytest.raises(ValueError, match=r"layers.2..q_proj.weight: .* those of layers.0..q_proj"):
        QKClip([*layers, layers[0]])
    layers[1].k_proj = layers[0].k_proj
    with pytest.raises(ValueError, match=r"layers.1..k_proj.weight: .* those of layers.0..k_proj"):
        QKClip(layers)


def test_a_process_group_is_one_and_stays_with_its_process():
    with pytest.raises(TypeError, match="QKClip: process_group: .* got str"):
        QKClip([Grouped(4, 2)], process_group="world")
    clip = QKClip([Grouped(4, 2)])
    assert copy.deepcopy(clip).layers[0] is not clip.layers[0]
    clip.process_group = object()
    with pytest.raises(TypeError, match="QKClip: process_group: expected none in a copy"):
        copy.deepcopy(clip)


def wrong_rows(layer: nn.Module) -> None:
    layer.k_proj.weight = nn.Parameter(torch.ones(7, 10, dtype=torch.float64))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            wrong_rows,
            r"layers.1..k_proj.weight: expected .2 heads . 4 rows, in., got .* .7, 10.",
        ),
        (lambda layer: setattr(layer, "head_dim", 5), "4 heads . 5 rows"),
        (lambda layer: setattr(layer, "num_kv_heads", 3), "num_kv_heads: expected a divisor of 4"),
        (lambda layer: setattr(layer, "num_heads", 5), "max_logits: expected 5 heads, got 4"),
        (lambda layer: setattr(layer, "max_logits", torch.ones(4).half()), "fp32 or fp64"),
        (lambda layer: setattr(layer, "max_logits", None), "fp32 or fp64, got None"),
        (lambda layer: setattr(layer, "max_logits", torch.ones(2, 2)), r"expected \[heads\]"),
        (lambda layer: setattr(layer, "max_logits", torch.ones(4, device="meta")), "one device"),
    ],
)
def test_geometry_is_checked_when_it_is_made_and_before_a_step_moves_anything(spoil, text):
    layers = [Grouped(4, 2), Grouped(4, 2)]
    clip = QKClip(layers, tau=1.0)
    layers[0].max_logits.fill_(9.0)
    old = [p.detach().clone() for p in layers[0].parameters()]
    spoil(layers[1])
    for call in (clip.step, lambda: QKClip(layers)):
        with pytest.raises((ValueError, TypeError), match=text):
            call()
    assert all(map(torch.equal, layers[0].parameters(), old))
    assert (layers[0].max_logits == 9).all()
    optimizer = MuonClip(layers[0].q_proj.parameters(), lr=0.1, qk_clip=clip)
    layers[0].q_proj.weight.grad = torch.ones_like(layers[0].q_proj.weight)
    with pytest.raises((ValueError, TypeError), match=text):
        optimizer.step()
    assert all(map(torch.equal, layers[0].parameters(), old))


@pytest.mark.parametrize(
    ("name", "value"),
    [("tau", math.nan), ("tau", math.inf), ("tau", 0.0), ("alpha", math.nan), ("alpha", 1.5)],
)
def test_numbers_are_checked_when_it_is_made_and_in_every_step(name: str, value: float):
    layer = Grouped(4, 2)
    with pytest.raises(ValueError, match=f"QKClip: {name}"):
        QKClip([layer], **{name: value})
    clip = QKClip([layer])
    setattr(clip, name, value)
    layer.max_logits.fill_(900.0)
    old = layer.q_proj.weight.detach().clone()
    with pytest.raises(ValueError, match=f"QKClip: {name}"):
        clip.step()
    assert torch.equal(layer.q_proj.weight, old) and (layer.max_logits == 900).all()


def test_bad_layers():
    with pytest.raises(ValueError, match="alpha"):
        QKClip([Grouped(4, 2)], alpha=2.0)
    with pytest.raises(ValueError, match="gqa_mode"):
        QKClip([Grouped(4, 2)], gqa_mode="mean")
    layer = Grouped(4, 2)
    del layer.num_kv_heads
    with pytest.raises(TypeError, match="num_kv_heads"):
        QKClip([layer])
