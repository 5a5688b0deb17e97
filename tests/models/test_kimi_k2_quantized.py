# SPDX-License-Identifier: MIT
"""Checkpoints with FP8 and INT4 experts: kept as they are, or dequantised on loading."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_ops import Fp8BlockWeight, Int4GroupWeight
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.checkpoint import shards
from kimi_ops.models.kimi_k2.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from kimi_ops.models.kimi_k2.pretrained import whole
from kimi_ops.moe.quantized import QuantizedWeight

IDS = torch.arange(24).view(2, 12)
FORMS = ["fp8", "int4"]
NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def plain_model() -> KimiK2:
    """Two MoE layers; 136 x 128 gives a ragged FP8 block and a ragged INT4 group."""
    config = dataclasses.replace(
        KimiK2Config.tiny(), hidden_size=136, moe_intermediate_size=128, torch_dtype="float32"
    )
    model = KimiK2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def quantised_checkpoint(folder, form: str, limit: int = 10**9) -> KimiK2:
    """Writes a checkpoint whose experts have `form`; returns the model that it stands for."""
    model = plain_model()
    model.save_pretrained(folder, max_shard_bytes=limit)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if ".experts." in n]:
            weight = tensors.pop(name)[None]
            quantise(tensors, name, weight, form)
        save_file(tensors, file)
    if (folder / INDEX_NAME).exists():
        index = {n: f.name for f in folder.glob("*.safetensors") for n in load_file(f)}
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = (
        {"quant_method": "fp8", "weight_block_size": [128, 128]}
        if form == "fp8"
        else {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    kind = Fp8BlockWeight if form == "fp8" else Int4GroupWeight
    for moe in model.moe_layers():  # a gate of 128 rows ends a block: both halves have their own
        for stack in (moe.experts.gate_up_proj, moe.experts.down_proj):
            stack.data = kind.quantize(stack.data).dequantize(torch.float32)
    return model


def quantise(tensors, name, weight, form) -> None:
    if form == "fp8":
        q = Fp8BlockWeight.quantize(weight)
        tensors[name], tensors[f"{name}_scale_inv"] = q.data[0].clone(), q.scale[0].clone()
    else:
        q = Int4GroupWeight.quantize(weight)
        tensors[f"{name}_packed"], tensors[f"{name}_scale"] = (
            q.packed[0].clone(),
            q.scale[0].clone(),
        )
        tensors[f"{name}_shape"] = torch.tensor(weight.shape[1:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [10**9, 200_000])
def test_kept_experts_are_the_bits_of_the_file(tmp_path, form, limit):
    expected = quantised_checkpoint(tmp_path, form, limit)
    kept = KimiK2.from_pretrained(tmp_path, experts=form)
    assert kept.experts_form == form and not kept.training
    stored = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    ours = whole(kept).tensors()
    shapes = {name for name in stored if name.endswith("_shape")}
    assert ours.keys() == stored.keys() - shapes
    for name, value in ours.items():
        assert value.dtype == stored[name].dtype
        assert torch.equal(
            value.view(-1).view(torch.uint8), stored[name].view(-1).view(torch.uint8)
        )
    for mine, other in zip(kept.moe_layers(), expected.moe_layers(), strict=True):
        for stack in ("gate_up_proj", "down_proj"):
            weight = getattr(mine.experts, stack)
            assert isinstance(weight, QuantizedWeight)
            assert torch.equal(weight.dequantize(torch.float32), getattr(other.experts, stack))
    torch.testing.assert_close(kept(IDS), expected(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slab", [2 << 20, 3000])
@pytest.mark.parametrize("form", FORMS)
def test_without_asking_they_are_dequantised(tmp_path, monkeypatch, form, slab):
    monkeypatch.setattr(shards, "_SLAB", slab)
    expected = quantised_checkpoint(tmp_path, form)
    loaded = KimiK2.from_pretrained(tmp_path)
    assert loaded.experts_form is None and loaded.training
    for name, value in expected.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    loaded.save_pretrained(tmp_path / "plain")
    again = KimiK2.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(IDS), loaded(IDS))
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_is_not_finite_is_named_in_kept_experts_too(tmp_path, form):
    quantised_checkpoint(tmp_path, form)
    scale = f"{NAME}_scale_inv" if form == "fp8" else f"{NAME}_scale"
    before = load_file(tmp_path / SINGLE_NAME)
    damage = {scale: before[scale].clone()}
    damage[scale][0, 1] = torch.nan
    cases = [(damage, f"{scale}: expected finite values, got nan in .* at .0, 1., from")]
    if form == "fp8":
        data = before[NAME].clone()
        data.view(torch.uint8)[100, 7] = 0xFF
        cases.append(({NAME: data}, f"{NAME}: expected finite values, got nan in .* at .100, 7."))
    for change, message in cases:
        save_file(before | change, tmp_path / SINGLE_NAME)
        with pytest.raises(ValueError, match=message):
            KimiK2.from_pretrained(tmp_path, experts=form)


@pytest.mark.parametrize("form", FORMS)
def test_generation_in_bfloat16(tmp_path, form):
    quantised_checkpoint(tmp_path, form)
    kept = KimiK2.from_pretrained(tmp_path, experts=form, dtype=torch.bfloat16)
    plain = KimiK2.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert kept(IDS).dtype == torch.bfloat16
    # Weights of few rows are not rounded to bfloat16, so one token may choose another expert.
    close = torch.isclose(kept(IDS), plain(IDS), rtol=0.1, atol=0.05).all(-1)
    assert close.numel() == IDS.numel() and close.sum() >= close.numel() - 1
    ids = kept.generate(IDS[:, :4], max_new_tokens=6)
    assert ids.shape == (2, 10) and not kept.training
    assert torch.equal(ids, kept.generate(IDS[:, :4], max_new_tokens=6))


@pytest.mark.parametrize("form", FORMS)
def test_experts_take_the_bytes_of_their_form(tmp_path, form):
    quantised_checkpoint(tmp_path, form)
    kept = KimiK2.from_pretrained(tmp_path, experts=form)
    experts = kept.moe_layers()[0].experts
    values = 8 * 3 * 128 * 136
    size = sum(buffer.nbytes for buffer in experts.buffers())
    assert size / values < (1.01 if form == "fp8" else 0.58)
    assert not list(experts.parameters())  # no optimizer may touch them


@pytest.mark.parametrize("form", FORMS)
def test_casts_copies_and_states_keep_the_form(tmp_path, form):
    quantised_checkpoint(tmp_path, form)
    kept = KimiK2.from_pretrained(tmp_path, experts=form)
    before = kept.moe_layers()[0].experts.down_proj.dequantize(torch.float32)
    other = copy.deepcopy(kept).to(torch.bfloat16)
    after = other.moe_layers()[0].experts.down_proj
    assert type(after) is type(kept.moe_layers()[0].experts.down_proj)
    assert torch.equal(after.dequantize(torch.float32), before)
    assert other.lm_head.weight.dtype == torch.bfloat16
    fresh = KimiK2.from_pretrained(tmp_path, experts=form)
    with torch.no_grad():
        for buffer in fresh.moe_layers()[0].experts.buffers():
            buffer.copy_(torch.zeros_like(buffer))
    fresh.load_state_dict(kept.state_dict())
    assert torch.equal(fresh(IDS), kept(IDS))
    assert kept.to("meta").moe_layers()[0].experts.down_proj.device.type == "meta"


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_to_what_is_not_quantised(tmp_path, form):
    expected = quantised_checkpoint(tmp_path, form)
    kept = KimiK2.from_pretrained(tmp_path, experts=form)
    kept(IDS).square().sum().backward()
    expected(IDS).square().sum().backward()
    theirs = dict(expected.named_parameters())
    for name, parameter in kept.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_training_and_saving_are_refused(tmp_path, form):
    quantised_checkpoint(tmp_path, form)
    kept = KimiK2.from_pretrained(tmp_path, experts=form)
    with pytest.raises(ValueError, match=f"KimiK2: experts: expected eval mode .* {form}, got a f"):
        kept.train()(IDS)
    with pytest.raises(ValueError, match=f"save_pretrained: model: expected plain .* got {form}"):
        kept.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    before = kept.lm_head.weight.clone()
    with pytest.raises(ValueError, match=f"init_weights: model: expected plain .* got {form}"):
        kept.init_weights(1)
    assert torch.equal(kept.lm_head.weight, before)


def edit(folder, change) -> None:
    stored = load_file(folder / SINGLE_NAME)
    change(stored)
    save_file(stored, folder / SINGLE_NAME)


def put(name, value):
    return lambda folder: edit(folder, lambda stored: stored.update({name: value}))


def drop(name):
    return lambda folder: edit(folder, lambda stored: stored.pop(name))


def configure(**values):
    def change(folder) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


blocks_of_64 = configure(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
DAMAGE = [
    ("fp8", drop(f"{NAME}_scale_inv"), f"got fp8 without a {NAME}_scale_inv for blocks"),
    ("fp8", put(f"{NAME}_scale_inv", torch.ones(1, 1)), "got fp8 without a .* for blocks"),
    (
        "fp8",
        put(f"{NAME}_scale", torch.ones(1)),
        f"{NAME}_scale: expected no such tensor beside F8",
    ),
    ("fp8", drop(NAME), f"without {NAME}"),
    ("fp8", put(NAME, torch.zeros(128, 136)), f"expected {NAME} stored as fp8, got plain"),
    ("fp8", blocks_of_64, r"got fp8 in blocks"),
    ("fp8", configure(moe_intermediate_size=64), "moe_intermediate_size as a multiple of 128"),
    ("int4", configure(moe_intermediate_size=60), "multiples of 8 beside 'int4', got 136 and 60"),
    ("int4", drop(f"{NAME}_packed"), f"without {NAME}"),
    ("int4", drop(f"{NAME}_scale"), rf"{NAME}_scale: expected shape \[128, 5\], got no such"),
    (
        "int4",
        put(f"{NAME}_scale", torch.ones(128, 2).bfloat16()),
        rf"{NAME}_scale: expected shape \[128, 5\], got \[128, 2\]",
    ),
    ("int4", put(f"{NAME}_scale", torch.ones(128, 5)), "got int4 with F32 scales, not BF16"),
    (
        "int4",
        put(f"{NAME}_packed", torch.ones(128, 34, dtype=torch.int32)),
        r"_packed: expected shape \[128, 17\], got \[128, 34\]",
    ),
    ("int4", put(f"{NAME}_packed", torch.ones(128, 17)), "_packed: expected I32, got F32"),
    (
        "int4",
        put(f"{NAME}_shape", torch.tensor([136, 128])),
        r"_shape: expected \[128, 136\], got \[136, 128\]",
    ),
    (
        "int4",
        put("model.layers.1.mlp.experts.3.up_proj.weight_zero_point", torch.ones(1)),
        "with m",
    ),
]


@pytest.mark.parametrize(("form", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_refused(tmp_path, monkeypatch, form, damage, message):
    quantised_checkpoint(tmp_path, form)
    damage(tmp_path)
    monkeypatch.setattr(KimiK2, "allocate", None)  # refused before memory is asked for
    with pytest.raises(ValueError, match=message):
        KimiK2.from_pretrained(tmp_path, experts=form)


def test_another_form_than_the_file_has_is_refused(tmp_path):
    quantised_checkpoint(tmp_path / "fp8", "fp8")
    quantised_checkpoint(tmp_path / "int4", "int4")
    for came, wanted in (("fp8", "int4"), ("int4", "fp8")):
        with pytest.raises(ValueError, match=f"stored as {wanted}, got {came}; use experts=None"):
            KimiK2.from_pretrained(tmp_path / came, experts=wanted)
    with pytest.raises(ValueError, match=r"experts: expected one of \['fp8', 'int4'\] or None"):
        KimiK2.from_pretrained(tmp_path / "fp8", experts="int8")
