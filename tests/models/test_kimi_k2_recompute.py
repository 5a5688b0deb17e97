# SPDX-License-Identifier: MIT
"""What forwards keep for their backwards: the same bits from less memory, and FP8 rows."""

import collections
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import kept_memory
from kimi_ops import Fp8Rows
from kimi_ops.models.kimi_k2 import Attention, KimiK2, KimiK2Config, load_layer
from kimi_ops.models.kimi_k2.recompute import Recomputes, fp8_storage
from kimi_ops.models.kimi_k2.rope import rotary_tables
from kimi_ops.train import TrainSettings
from kimi_ops.train.trainer import Trainer

IDS = torch.randint(0, 64, (3, 21), generator=torch.Generator().manual_seed(0))


def made(**fields):
    model = KimiK2(dataclasses.replace(KimiK2Config.tiny(), **fields))
    for attention in model.attention_layers():
        attention.track_max_logits = True
    return model


def run(model, dtype=None, **inputs):
    """Loss and gradients of one step, with what the layers count."""
    model.zero_grad()
    model.reset_statistics()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(IDS[:, :-1], **inputs)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), IDS[:, 1:].flatten())
    balance = model.auxiliary_loss()
    (loss + balance).backward()
    loads = [moe.tokens_per_expert.clone() for moe in model.moe_layers()]
    maxima = [attention.max_logits.clone() for attention in model.attention_layers()]
    gradients = [p.grad.clone() for p in model.parameters()]
    return [loss.detach(), balance.detach(), *loads, *maxima], gradients


@pytest.mark.parametrize("way", ["selective", "full"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"q_lora_rank": None, "attention_bias": True}, {"n_shared_experts": 0, "seq_aux": False}],
)
def test_recomputation_changes_no_bit(way, fields):
    model = made(aux_loss_alpha=0.01, **fields)
    mask = torch.ones_like(IDS[:, :-1])
    mask[0, :5] = 0
    for inputs in ({}, {"attention_mask": mask}):
        for dtype in (None, torch.bfloat16):
            model.recompute = "none"
            facts, gradients = run(model, dtype, **inputs)
            model.recompute = way
            again = run(model, dtype, **inputs)
            assert all(map(torch.equal, facts, again[0]))
            assert all(map(torch.equal, gradients, again[1]))


def test_recomputation_of_16_bit_weights_changes_no_bit():
    model = made().bfloat16()
    facts, gradients = run(model)
    for model.recompute in ("selective", "full"):
        again = run(model)
        assert all(map(torch.equal, facts, again[0])) and all(map(torch.equal, gradients, again[1]))


def test_less_is_kept():
    """Of 4 sequences of 64 tokens in the layers of `mini`, counted allocation by allocation."""
    model = KimiK2(dataclasses.replace(KimiK2Config.mini(), num_hidden_layers=2))
    ids = torch.randint(0, 256, (4, 64))
    kept = {}
    for way, fp8 in [("none", False), ("selective", False), ("selective", True), ("full", False)]:
        model.fp8_activations = False
        model.recompute, model.fp8_activations = way, fp8
        kept[way, fp8] = kept_memory(lambda: model(ids).sum() + model.auxiliary_loss(), "cpu")
        model.reset_statistics()
    plain, selective = kept["none", False], kept["selective", False]
    assert selective < 0.5 * plain
    assert kept["full", False] < 0.15 * plain
    # x [T, 128] and gate_up [4 T, 128] of one layer, four bytes to one and a scale for each row
    saved = 5 * 256 * (128 * 3 - 4)
    assert abs(selective - kept["selective", True] - saved) < 0.1 * saved


class Computed(TorchDispatchMode):
    """Counts what reaches the kernels below a mode that may have kept it."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def test_attention_and_wide_products_are_not_computed_again(monkeypatch):
    """Nor the maxima of the logits; whole layers are."""
    model, calls = made(), []
    largest = Attention._largest
    monkeypatch.setattr(Attention, "_largest", lambda *a: calls.append(a) or largest(*a))
    computed = []
    for model.recompute in ("none", "selective", "full"):
        with Computed() as seen:
            run(model)
        computed.append(seen.counts)
    assert len(calls) == 3 * 3  # of the forwards alone
    attended = [counts["_scaled_dot_product_flash_attention_for_cpu"] for counts in computed]
    assert attended == [3, 3, 6]
    # again: the expansions of queries and of keys and values, in each of three layers
    assert computed[1]["mm"] - computed[0]["mm"] == 2 * 3


def test_fp8_storage_rounds_gradients_of_the_experts_alone():
    model = KimiK2(dataclasses.replace(KimiK2Config.mini(), num_hidden_layers=2))
    facts, gradients = run(model)
    model.fp8_activations = True
    rounded = run(model)
    assert all(map(torch.equal, facts, rounded[0]))
    names = [name for name, _ in model.named_parameters()]
    far = {
        name: float((a - b).norm() / a.norm())
        for name, a, b in zip(names, gradients, rounded[1], strict=True)
    }
    assert far["lm_head.weight"] == 0 and far["model.norm.weight"] == 0
    for name in ("gate_up_proj", "down_proj"):
        assert 0.003 < far[f"model.layers.1.mlp.experts.{name}"] < 0.05
    assert max(far.values()) < 0.08


def test_fp8_storage_keeps_rows_of_the_given_width_as_fp8():
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    narrow = torch.randn(5, 7, requires_grad=True)
    with fp8_storage(256):
        (x.square().sum() + narrow.square().sum()).backward()
    assert torch.equal(narrow.grad, 2 * narrow.detach())
    rows = Fp8Rows.quantize(x.detach())
    assert torch.equal(x.grad, 2 * rows.dequantize(torch.float32))
    assert not torch.equal(x.grad, 2 * x.detach())


def step(layer, x, tables):
    """What a layer gives, its gradients, and how many values it kept for them, without x."""
    layer.zero_grad()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        y = layer(x, *tables)
    y.square().sum().backward()
    fixed = {p.data_ptr() for p in layer.parameters()}
    values = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in fixed}
    return [y.detach(), *(p.grad for p in layer.parameters())], sum(values.values())


def test_a_layer_alone_is_told_with_all_its_parts(tmp_path):
    KimiK2(KimiK2Config.tiny()).save_pretrained(tmp_path)
    x = torch.randn(2, 9, 32, requires_grad=True)
    tables = rotary_tables(KimiK2Config.tiny(), torch.arange(9)[None])
    for number in range(2):  # dense, with experts
        layer = load_layer(tmp_path, number)
        plain, most = step(layer, x, tables)
        found = []
        for way in ("selective", "full"):
            layer.recompute = way
            parts = [part for part in layer.modules() if isinstance(part, Recomputes)]
            assert len(parts) >= 3 and all(part.recompute == way for part in parts)
            again, kept = step(layer, x, tables)
            assert all(map(torch.equal, plain, again))
            found.append(kept)
        assert most > found[0] > found[1]
        with pytest.raises(ValueError, match="recompute: expected one of none, selective, full"):
            layer.recompute = "some"
        assert layer.recompute == layer.mlp.recompute == "full"
    layer.recompute, layer.fp8_activations = "none", True
    assert layer.mlp.fp8_activations and step(layer, x, tables)[1] < most


@pytest.mark.parametrize(
    ("before", "after"), [(("full", False), ("selective", True)), (("none", True), ("full", False))]
)
def test_a_trainer_sets_both_at_once(before, after):
    """One after the other would be refused on the way: FP8 beside full."""
    model = KimiK2(KimiK2Config.mini())
    model.recompute, model.fp8_activations = before
    way, fp8 = after
    settings = TrainSettings(
        preset="mini", steps=1, window=16, sequences=1, recompute=way, fp8_activations=fp8
    )
    Trainer(settings, model)
    parts = [part for part in model.modules() if isinstance(part, Recomputes)]
    assert {(part.recompute, part.fp8_activations) for part in parts} == {after}


def test_what_is_not_known_is_refused():
    model = made()
    with pytest.raises(ValueError, match="KimiK2: recompute: expected one of none, selective, ful"):
        model.recompute = "some"
    model.fp8_activations = True
    with pytest.raises(ValueError, match="fp8_activations: expected off beside recompute full"):
        model.recompute = "full"
    assert model.recompute == "none" and model.fp8_activations


def test_a_compiled_forward_plans_its_own_backward():
    torch.compiler.reset()
    model = made()
    model.recompute = "selective"
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="KimiK2: recompute: expected none in a compiled forward"):
        compiled(IDS)
