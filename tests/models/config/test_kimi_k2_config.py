# SPDX-License-Identifier: MIT
"""Configuration, rotary frequencies, softmax scale and parameter counts."""

import dataclasses
import json
import math

import pytest
import torch

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, RopeScaling
from kimi_ops.models.kimi_k2.config import presets
from kimi_ops.models.kimi_k2.parameters import parameter_report
from kimi_ops.models.kimi_k2.rope import inverse_frequencies, rotary_tables, rotate

K2 = KimiK2Config.k2()


def test_k2_on_the_meta_device_counts_exactly():
    model = KimiK2(K2, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    biases = sum(moe.gate.e_score_correction_bias.numel() for moe in model.moe_layers())
    assert parameters == 1_026_408_209_408
    assert parameters + biases == 1_026_408_232_448


def test_the_report_of_k2():
    report = parameter_report(K2)
    assert report.parameters == 1_026_408_209_408
    assert report.total == 1_026_408_232_448
    assert report.active == 32_861_500_928
    assert report.active_without_embedding == 31_687_095_808
    assert report.active_without_embedding_and_head == 30_512_690_688
    assert report.kv_cache_bytes_per_token == 70_272
    totals = {part.name: part.total for part in report.parts}
    assert totals["attention"] + totals["attention norms"] == 6_168_569_856
    assert totals["routed experts"] == 1_014_686_023_680
    assert totals["shared experts"] == 2_642_411_520
    assert totals["routers"] == 165_150_720
    # 16 x 56 blocks in each of an expert's three matrices, 576 rows are 5 blocks, the last ragged.
    scales = {part.name: part.scales for part in report.parts}
    assert scales["routed experts"] == 3 * 16 * 56
    assert scales["attention"] == 12 * 56 + 96 * 12 + 5 * 56 + 128 * 4 + 56 * 64
    text = str(report)
    assert "1,026,408,232,448" in text and "98.86 %" in text and "70,272 B" in text


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": 0}]
    + [{"tie_word_embeddings": True}, {"first_k_dense_replace": 0}, {"moe_layer_freq": 2}],
    ids=str,
)
def test_the_report_equals_a_built_model(changes):
    config = dataclasses.replace(KimiK2Config.tiny(), **changes)
    model = KimiK2(config)
    report = parameter_report(config)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.bias_buffers == sum(
        moe.gate.e_score_correction_bias.numel() for moe in model.moe_layers()
    )


def test_softmax_scales_of_the_releases():
    def scale(factor):
        scaling = dataclasses.replace(K2.rope_scaling, factor=factor)
        return dataclasses.replace(K2, rope_scaling=scaling).softmax_scale

    assert K2.softmax_scale == pytest.approx(0.13086080, abs=1e-8)
    assert scale(64.0) == pytest.approx(0.14467963, abs=1e-8)
    assert scale(1.0) == pytest.approx(0.07216878, abs=1e-8)
    plain = dataclasses.replace(K2, rope_scaling=None)
    assert plain.softmax_scale == pytest.approx(192**-0.5)


def test_yarn_of_k2_is_a_cut_after_pair_19():
    stretched = inverse_frequencies(K2)
    plain = inverse_frequencies(dataclasses.replace(K2, rope_scaling=None))
    expected = torch.tensor([50000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(plain.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(stretched[:20], plain[:20])
    torch.testing.assert_close(stretched[20:], plain[20:] / 32)
    cos, sin = rotary_tables(K2, torch.arange(5))
    assert float((cos**2 + sin**2 - 1).abs().max()) < 1e-6  # no growth: mscale = mscale_all_dim


@pytest.mark.parametrize(
    "scaling",
    [
        K2.rope_scaling,
        RopeScaling(factor=8.0, original_max_position_embeddings=4096),
        RopeScaling(factor=40.0, beta_fast=32, beta_slow=1, mscale=0.7, mscale_all_dim=1.0),
        RopeScaling(factor=40.0, mscale_all_dim=1.0),
        RopeScaling(factor=40.0, mscale=0.7),
        RopeScaling(factor=8.0, attention_factor=1.3),
        RopeScaling(factor=8.0, truncate=False),
        RopeScaling(factor=4.0, rope_type="linear"),
        RopeScaling(factor=4.0, rope_type="dynamic"),
        RopeScaling(factor=8.0, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
        None,
    ],
    ids=str,
)
def test_frequencies_equal_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3RotaryEmbedding,
        yarn_apply_mscale,
    )

    config = dataclasses.replace(K2, rope_scaling=scaling)
    values = config.to_dict()
    for name in ("model_type", "architectures", "torch_dtype"):
        del values[name]
    theirs = transformers.DeepseekV3Config(**values)
    scale = yarn_apply_mscale(theirs.rope_parameters, config.qk_head_dim**-0.5)
    assert config.softmax_scale == pytest.approx(scale)
    rotary = DeepseekV3RotaryEmbedding(theirs)
    torch.testing.assert_close(inverse_frequencies(config), rotary.inv_freq, rtol=1e-6, atol=0)
    positions = torch.arange(300)
    cos, sin = rotary_tables(config, positions)
    theirs = rotary(torch.zeros(1, dtype=torch.float32), positions[None])
    for ours, other in zip((cos, sin), theirs, strict=True):
        torch.testing.assert_close(ours, other[0, :, :32], rtol=1e-5, atol=2e-5)


def test_rotation_turns_interleaved_pairs():
    x = torch.randn(3, 7, 8, dtype=torch.float32)
    angle = torch.rand(7, 4)
    turned = rotate(x, angle.cos(), angle.sin())
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(7, 4), angle)).flatten(-2)
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("preset", presets.NAMES)
def test_presets_survive_a_round_trip_through_json(preset):
    config = getattr(KimiK2Config, preset)()
    assert KimiK2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_new_spellings_are_read_and_harmless_keys_kept():
    values = KimiK2Config.tiny().to_dict()
    rope = {**values.pop("rope_scaling"), "rope_theta": values.pop("rope_theta")}
    rope["rope_type"] = rope.pop("type")
    values |= {"rope_parameters": rope, "dtype": values.pop("torch_dtype"), "do_sample": True}
    config = KimiK2Config.from_dict(values)
    assert config == dataclasses.replace(KimiK2Config.tiny(), extra={"do_sample": True})
    assert config.to_dict()["do_sample"] is True
    plain = KimiK2Config.from_dict({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert plain.rope_scaling is None and plain.rope_theta == 7.0
    assert math.isclose(plain.softmax_scale, 192**-0.5)


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
YARN_OF_TINY = KimiK2Config.tiny().to_dict()["rope_scaling"]
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def grouped(**weights):
    return {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"} | weights}}}


@pytest.mark.parametrize("absent", [None, {}], ids=str)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_an_empty_spelling_does_not_hide_the_other(spelling, absent):
    values = KimiK2Config.tiny().to_dict()
    theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
    other = {"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}[spelling]
    values |= {spelling: absent, other: {**scaling, "rope_theta": theta}}
    assert KimiK2Config.from_dict(values) == KimiK2Config.tiny()
    both = KimiK2Config.tiny().to_dict() | {"rope_parameters": {**scaling, "rope_theta": theta}}
    assert KimiK2Config.from_dict(both) == KimiK2Config.tiny()


def test_windows_are_found_where_transformers_finds_them():
    values = {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    read = KimiK2Config.from_dict
    assert read(values).rope_scaling.original_max_position_embeddings == 512
    values["original_max_position_embeddings"] = 128
    assert read(values).rope_scaling.original_max_position_embeddings == 128
    values["rope_scaling"] = {"type": "yarn", "factor": None}
    assert read(values).rope_scaling.factor == 4.0


def test_what_transformers_writes_is_read():
    transformers = pytest.importorskip("transformers")
    values = KimiK2Config.tiny().to_dict()
    for name in ("model_type", "architectures"):
        del values[name]
    for changes in ({}, {"rope_interleave": False}, {"num_key_value_heads": None}):
        theirs = transformers.DeepseekV3Config(**values | changes)
        again = KimiK2Config.from_dict(json.loads(theirs.to_json_string(use_diff=False)))
        expected = KimiK2Config.from_dict(values | changes)
        ours = dataclasses.replace(
            again, extra={}, model_type=expected.model_type, architectures=expected.architectures
        )
        assert ours == expected
    defaults = transformers.DeepseekV3Config()
    assert KimiK2Config.from_dict(defaults.to_dict()).n_routed_experts == 256


def test_a_null_is_what_transformers_makes_of_it():
    values = KimiK2Config.tiny().to_dict() | {"n_shared_experts": None, "num_key_value_heads": None}
    config = KimiK2Config.from_dict(values)
    assert config.n_shared_experts == 0 and config.num_key_value_heads == 2


BAD_VALUES = [
    ({"num_experts_per_tok": 9}, ValueError, "num_experts_per_tok: expected at most 8 selectable"),
    ({"n_group": 3}, ValueError, "n_group: expected a divisor of n_routed_experts = 8"),
    ({"n_group": 4, "topk_group": 5}, ValueError, "topk_group: expected at most n_group = 4"),
    (
        {"n_group": 8, "topk_group": 1},
        ValueError,
        "num_experts_per_tok: expected at most 1 selectable",
    ),
    (
        {"num_key_value_heads": 1},
        ValueError,
        "num_key_value_heads: expected num_attention_heads = 2",
    ),
    ({"qk_rope_head_dim": 7}, ValueError, "qk_rope_head_dim: expected an even number"),
    ({"hidden_size": 0}, ValueError, "hidden_size: expected at least 1"),
    ({"hidden_size": "32"}, TypeError, "hidden_size: expected an int, got str"),
    ({"q_lora_rank": 0}, ValueError, "q_lora_rank: expected at least 1 or None"),
    ({"attention_dropout": 0.1}, ValueError, "attention_dropout: expected 0"),
    ({"rms_norm_eps": 0.0}, ValueError, "rms_norm_eps: expected a number > 0"),
    ({"scoring_func": "tanh"}, ValueError, "scoring_func: expected one of"),
    ({"hidden_act": "relu"}, ValueError, "hidden_act: expected one of"),
    ({"torch_dtype": "int4"}, ValueError, "torch_dtype: expected one of"),
    ({"n_shared_experts": -1}, ValueError, "n_shared_experts: expected an int >= 0"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ValueError, "rope_type: expected one"),
    (
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}},
        ValueError,
        "type: ex",
    ),
    ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, TypeError, "low_freq_factor: expected"),
    ({"rope_scaling": YARN | {"attn_factor": 0.5}}, ValueError, r"rope_scaling\.attn_factor: "),
    ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, ValueError, "partial_rotary_factor"),
    ({"rope_scaling": YARN | {"answer": 42}}, ValueError, r"rope_scaling\.answer: expected only"),
    ({"rope_scaling": YARN | {"truncate": 1}}, TypeError, "truncate: expected a bool, got int"),
    (
        {"rope_scaling": YARN | {"attention_factor": -1}},
        ValueError,
        "attention_factor: expected a ",
    ),
    ({"rope_parameters": {"full_attention": YARN}}, ValueError, "parameters for full_attention"),
    ({"rope_parameters": YARN | {"factor": 3.0}}, ValueError, "expected what rope_parameters says"),
    ({"rope_parameters": YARN_OF_TINY | {"rope_theta": 7}}, ValueError, "rope_theta: expected one"),
    ({"dtype": "bfloat16"}, ValueError, "dtype: expected torch_dtype = 'float32'"),
    ({"answer": 42}, ValueError, "answer: expected only fields that this model knows, got 42"),
    ({"sliding_window": 512}, ValueError, "sliding_window: expected None or no such field"),
    ({"swiglu_limit": 7.0}, ValueError, "swiglu_limit: expected None"),
    ({"partial_rotary_factor": 0.5}, ValueError, "partial_rotary_factor: expected 1"),
    ({"layer_types": ["full_attention", "linear"]}, ValueError, "layer_types: expected full_att"),
    ({"rope_interleave": None}, ValueError, "rope_interleave: expected a bool"),
    ({"model_type": "deepseek_v32"}, ValueError, "model_type: expected one of"),
    ({"n_routed_experts": 1025}, ValueError, "n_routed_experts: expected at most 1024"),
    ({"num_experts_per_tok": 33, "n_routed_experts": 64}, ValueError, "num_experts_per_tok: .*32"),
    ({"quantization_config": "fp8"}, TypeError, "quantization_config: expected a dict or null"),
    ({"quantization_config": {}}, ValueError, "quantization_config.quant_method: expected one of"),
    ({"quantization_config": {"quant_method": "gptq"}}, ValueError, "got 'gptq'; dequantise"),
    ({"quantization_config": FP8 | {"weight_block_size": "128x128"}}, ValueError, "two sizes, as"),
    ({"quantization_config": FP8 | {"weight_block_size": [128]}}, ValueError, "two sizes, as"),
    ({"quantization_config": FP8 | {"weight_block_size": [128, 0]}}, ValueError, "two sizes, as"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, ValueError, "fmt: expected e4m3, got 'e5m2'"),
    ({"quantization_config": PACKED | {"format": "marlin"}}, ValueError, "format: expected one of"),
    ({"quantization_config": PACKED | grouped(num_bits=8)}, ValueError, "expected 4 bits, int"),
    (
        {"quantization_config": PACKED | grouped(group_size=64)},
        ValueError,
        "group_size: expected 3",
    ),
    ({"quantization_config": PACKED | grouped(symmetric=False)}, ValueError, "symmetric: expected"),
    ({"quantization_config": PACKED | {"config_groups": [1]}}, ValueError, "config_groups: expect"),
    ({"rope_scaling": {"type": "yarn"}}, ValueError, "rope_scaling: expected a factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, ValueError, "factor >= 1"),
    ({"rope_scaling": {"type": "yarn", "factor": "2"}}, TypeError, "factor: expected a number"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}}, ValueError, "beta_fast: .*0"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
        ValueError,
        "original_max_position_embeddings: expected at least 1",
    ),
    ({"rope_scaling": 3}, TypeError, "rope_scaling: expected a dict or null, got int"),
    ({"rope_parameters": [3]}, TypeError, "rope_parameters: expected a dict or null, got list"),
    ({"rope_theta": 0}, ValueError, "rope_theta: expected a number > 1, got 0"),
    ({"rope_theta": 1.0}, ValueError, "rope_theta: expected a number > 1, got 1.0"),
    ({"rope_theta": float("inf")}, ValueError, "rope_theta: expected a finite number"),
    (
        {"routed_scaling_factor": "x"},
        TypeError,
        "routed_scaling_factor: expected a number, got str",
    ),
    ({"routed_scaling_factor": 0}, ValueError, "routed_scaling_factor: expected a number > 0"),
    ({"aux_loss_alpha": -1.0}, ValueError, "aux_loss_alpha: expected at least 0"),
    ({"rms_norm_eps": "1e-6"}, TypeError, "rms_norm_eps: expected a number, got str"),
    ({"q_lora_rank": "x"}, TypeError, "q_lora_rank: expected an int or None, got str"),
    ({"eos_token_id": 64}, ValueError, r"eos_token_id: expected ids in 0 \.\. 63, .* got 64; pass"),
    ({"eos_token_id": [1, 64]}, ValueError, r"eos_token_id: expected ids .*, got \[1, 64\]"),
    ({"eos_token_id": [1, "2"]}, TypeError, "eos_token_id: expected an int, a list of int or None"),
    ({"bos_token_id": -1}, ValueError, "bos_token_id: expected ids in 0 .. 63, .* got -1"),
    ({"bos_token_id": [1]}, TypeError, r"bos_token_id: expected an int or None, got \[1\]"),
    ({"pad_token_id": 163839}, ValueError, "pad_token_id: expected ids in 0 .. 63"),
    ({"pad_token_id": True}, TypeError, "pad_token_id: expected an int or None, got True"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_VALUES)
def test_bad_values(changes, error, message):
    with pytest.raises(error, match=f"KimiK2Config: .*{message}"):
        KimiK2Config.from_dict({**KimiK2Config.tiny().to_dict(), **changes})


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        KimiK2Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="JSON"):
        KimiK2Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a JSON object, got .*config\.json, which holds a list"):
        KimiK2Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"hidden_size": "x"}')
    with pytest.raises(ValueError, match=r"hidden_size: expected an int, .*in .*config\.json"):
        KimiK2Config.from_file(tmp_path / "config.json")


def test_a_dict_is_no_rope_scaling_of_the_constructor():
    with pytest.raises(TypeError, match=r"rope_scaling: expected a RopeScaling .*from_dict"):
        KimiK2Config(rope_scaling={"type": "yarn", "factor": 2.0})
