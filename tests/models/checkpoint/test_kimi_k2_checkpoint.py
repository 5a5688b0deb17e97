# SPDX-License-Identifier: MIT
"""Checkpoints in the Hugging Face layout: exchange with transformers, FP8, saves that fail."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_ops.formats import dequantize_fp8, fp8_values
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.checkpoint import files, saving
from kimi_ops.models.kimi_k2.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from kimi_ops.models.kimi_k2.pretrained import whole

IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def model() -> KimiK2:
    model = KimiK2(KimiK2Config.tiny()).eval()
    model.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for moe in model.moe_layers():
            moe.gate.e_score_correction_bias.normal_(0, 0.2, generator=generator)
    return model


def assert_same_weights(a: KimiK2, b: KimiK2) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize("limit", [5_000_000_000, 20_000, 1])
def test_a_round_trip_keeps_every_bit(model, tmp_path, limit):
    model.save_pretrained(tmp_path, max_shard_bytes=limit)
    files = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in files if name.startswith(".")]
    assert (SINGLE_NAME in files) == (limit > 20_000) != (INDEX_NAME in files)
    if INDEX_NAME in files:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        stored = {p.name: load_file(p) for p in tmp_path.glob("*.safetensors")}
        assert all(name in stored[file] for name, file in index["weight_map"].items())
        total = sum(t.nbytes for tensors in stored.values() for t in tensors.values())
        assert index["metadata"]["total_size"] == total
        if limit > 1:
            assert all(sum(t.nbytes for t in s.values()) <= limit for s in stored.values())
    again = KimiK2.from_pretrained(tmp_path)
    assert_same_weights(model, again)
    assert torch.equal(model(IDS), again.eval()(IDS))


def test_names_and_shapes_in_the_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE_NAME)
    config = model.config
    for expert in (0, config.n_routed_experts - 1):
        prefix = f"model.layers.1.mlp.experts.{expert}."
        assert stored[prefix + "gate_proj.weight"].shape == (16, 32)
        assert stored[prefix + "up_proj.weight"].shape == (16, 32)
        assert stored[prefix + "down_proj.weight"].shape == (32, 16)
    both = model.moe_layers()[0].experts.gate_up_proj
    assert torch.equal(stored["model.layers.1.mlp.experts.2.up_proj.weight"], both[2, 16:])
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert "model.layers.0.mlp.gate_proj.weight" in stored  # the dense layer
    experts = 3 * config.n_routed_experts * 2
    attention, norms = 7 * config.num_hidden_layers, 2 * config.num_hidden_layers
    assert len(stored) == 3 + attention + norms + 3 + 2 * (3 + 2) + experts
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_bfloat16_keeps_the_router_bias_in_float32(model, tmp_path):
    bias = model.moe_layers()[0].gate.e_score_correction_bias.clone()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = KimiK2.from_pretrained(tmp_path)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(again.moe_layers()[0].gate.e_score_correction_bias, bias)
    assert_same_weights(model, again)
    wide = KimiK2.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.lm_head.weight.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())


def test_tied_embeddings_are_stored_once(tmp_path):
    config = dataclasses.replace(KimiK2Config.tiny(), tie_word_embeddings=True)
    model = KimiK2(config)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE_NAME)
    again = KimiK2.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same_weights(model, again)


def test_an_older_checkpoint_is_replaced_whole(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", SINGLE_NAME}
    model.save_pretrained(tmp_path, max_shard_bytes=50_000)
    assert not (tmp_path / SINGLE_NAME).exists()
    assert_same_weights(model, KimiK2.from_pretrained(tmp_path))


def test_transformers_loads_our_checkpoint(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert model.config.model_type == "kimi_k2"  # for which transformers has no class
    model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    other.set_experts_implementation("eager")
    torch.testing.assert_close(model(IDS), other.eval()(IDS).logits, rtol=1e-5, atol=1e-5)


def theirs(transformers, **values):
    """A model of transformers with every part, and random biases of the router."""
    config = transformers.DeepseekV3Config(
        **{
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 1024,
            "rope_theta": 50000.0,
            "rope_scaling": KimiK2Config.k2().to_dict()["rope_scaling"] | {"factor": 4.0},
            "num_mtp_layers": 0,
        }
        | values
    )
    torch.manual_seed(5)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("limit", ["5GB", "30KB"])
def test_we_load_a_checkpoint_of_transformers(tmp_path, limit):
    other = theirs(pytest.importorskip("transformers"))
    other.save_pretrained(tmp_path, max_shard_size=limit)
    assert (limit == "30KB") == (tmp_path / INDEX_NAME).exists()
    other.set_experts_implementation("eager")
    ours = KimiK2.from_pretrained(tmp_path).eval()
    assert ours.config.softmax_scale == pytest.approx(other.model.layers[0].self_attn.scaling)
    ids = torch.arange(60).view(2, 30)
    torch.testing.assert_close(ours(ids), other(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [10**9, 60_000], ids=["whole", "shards"])
def test_from_transformers_and_back(tmp_path, tied, dtype, limit):
    """Their save, our load, our save, their load: every bit, and what their config says."""
    transformers = pytest.importorskip("transformers")
    first = theirs(transformers, tie_word_embeddings=tied).to(dtype)
    first.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    KimiK2.from_pretrained(tmp_path / "theirs").save_pretrained(
        tmp_path / "ours", max_shard_bytes=limit
    )
    assert (limit == 60_000) == (tmp_path / "ours" / INDEX_NAME).exists()
    last, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values())
    assert last.dtype == dtype and type(last) is type(first)
    assert (last.lm_head.weight is last.model.embed_tokens.weight) == tied
    states = first.state_dict(), last.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value.float(), states[1][name].float()), name
    before, after = first.config.to_dict(), last.config.to_dict()
    assert {name for name in before if before[name] != after.get(name)} == {"_name_or_path"}


def quantize(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 with s = max|block| / 448, block by block."""
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    q = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale[i, j] = weight[part].abs().max() / 448
            q[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return q, scale


def test_fp8_blocks_are_multiplied_by_their_scale():
    torch.manual_seed(6)
    weight = torch.randn(576, 300) * torch.logspace(-3, 3, 576)[:, None]
    q, scale = quantize(weight, (128, 128))
    assert scale.shape == (5, 3)  # both edges are ragged
    value = dequantize_fp8(q, scale)
    for i, j in [(0, 0), (127, 128), (128, 127), (575, 299), (512, 256)]:
        assert value[i, j] == q[i, j].float() * scale[i // 128, j // 128]
    assert float((value - weight).abs().max() / weight.abs().max()) < 2**-4


def test_every_fp8_byte_is_converted_as_torch_does():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 32)
    value, expected = fp8_values(every), every.float()
    assert torch.equal(value.isnan(), expected.isnan()) and value.isnan().sum() == 2
    there = ~expected.isnan()
    assert torch.equal(value[there].view(torch.int32), expected[there].view(torch.int32))
    assert torch.equal(fp8_values(every[:, ::2])[:, 1:], value[:, 2::2])  # strides


def fp8_checkpoint(model: KimiK2, folder, block) -> dict[str, torch.Tensor]:
    """Replace the MLP and attention matrices of a saved checkpoint; what loading must give."""
    model.save_pretrained(folder)
    stored = load_file(folder / SINGLE_NAME)
    expected = dict(stored)
    for name, weight in list(stored.items()):
        kept = "norm" in name or "embed" in name or "lm_head" in name or "mlp.gate." in name
        if not kept:
            stored[name], stored[f"{name}_scale_inv"] = quantize(weight, block)
            scale = stored[f"{name}_scale_inv"].repeat_interleave(block[0], 0)
            scale = scale.repeat_interleave(block[1], 1)[: weight.shape[0], : weight.shape[1]]
            expected[name] = stored[name].float() * scale
    save_file(stored, folder / SINGLE_NAME)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def test_an_fp8_checkpoint_is_dequantised(model, tmp_path):
    expected = fp8_checkpoint(model, tmp_path, (8, 12))
    again = KimiK2.from_pretrained(tmp_path)
    loaded = whole(again).tensors()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    again.save_pretrained(tmp_path)  # plain again: no quantisation may be claimed
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_weights(again, KimiK2.from_pretrained(tmp_path))


def test_rotary_tables_and_prediction_layers_of_old_files_are_skipped(model, tmp_path):
    model.save_pretrained(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.3.embed_tokens.weight": torch.zeros(2, 2),
    }
    save_file(load_file(tmp_path / SINGLE_NAME) | extra, tmp_path / SINGLE_NAME)
    assert_same_weights(model, KimiK2.from_pretrained(tmp_path))


def test_a_full_disk_leaves_the_folder_as_it_was(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    written = []

    def full(content, path, metadata):
        if written:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(content, path, metadata)

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match="save_pretrained: folder: expected .*No space left"):
        model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    assert written and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


LIMITS = [(70_000, 70_000), (70_000, 10**9), (10**9, 70_000), (10**9, 10**9)]


def changed(model: KimiK2, config: KimiK2Config | None = None) -> KimiK2:
    """Another model of the same shapes."""
    other = copy.deepcopy(model)
    other.config = config or other.config
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    return other


def fail_at(monkeypatch, call: int) -> list:
    """Let the rename or removal with number `call` raise."""
    calls = []

    def counting(function):
        def count(*arguments, **options):
            calls.append(arguments)
            if len(calls) == call + 1:
                raise OSError(5, "Input/output error")
            return function(*arguments, **options)

        return count

    monkeypatch.setattr(os, "replace", counting(os.replace))
    monkeypatch.setattr(Path, "unlink", counting(Path.unlink))
    return calls


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("reader", ["ours", "transformers"])
def test_a_save_that_dies_leaves_all_old_or_all_new_weights(model, tmp_path, limits, reader):
    """The process dies before each rename and each removal in turn."""
    if reader == "transformers":
        transformers = pytest.importorskip("transformers")
        model.config.model_type = "deepseek_v3"
    states, new, step = [], changed(model), 0
    while True:
        folder = tmp_path / str(step)
        model.save_pretrained(folder, max_shard_bytes=limits[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.Staging, "discard", lambda _: None)  # the dead clean nothing up
            calls = fail_at(patch, step)
            try:
                new.save_pretrained(folder, max_shard_bytes=limits[1])
            except OSError as error:
                assert "still whole" in str(error)
        if reader == "ours":
            seen = KimiK2.from_pretrained(folder).state_dict()
        else:
            seen = transformers.DeepseekV3ForCausalLM.from_pretrained(folder).state_dict()
        old = torch.equal(seen["lm_head.weight"], model.lm_head.weight)
        for name, value in (model if old else new).state_dict().items():
            assert torch.equal(seen[name], value), (step, name)
        states.append(old)
        if len(calls) <= step:
            break
        new.save_pretrained(folder, max_shard_bytes=limits[1])  # sweeps what the other left
        assert_same_weights(new, KimiK2.from_pretrained(folder))
        left = {path.name for path in folder.iterdir()} - {"config.json", INDEX_NAME, SINGLE_NAME}
        weights = json.loads((folder / INDEX_NAME).read_text()) if left else {"weight_map": {}}
        assert left == set(weights["weight_map"].values())
        step += 1
    assert states[0] and not states[-1] and states == sorted(states, reverse=True)


@pytest.mark.parametrize("step", range(4))
def test_a_rename_that_fails_is_taken_back(model, tmp_path, step):
    model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = changed(model, dataclasses.replace(model.config, rms_norm_eps=1e-5))
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(patch, step)
        with pytest.raises(OSError, match="still whole"):
            new.save_pretrained(tmp_path, max_shard_bytes=60_000)
    assert len(calls) > step + 1  # it cleaned up
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, step)
        with pytest.raises(OSError, match="still whole"):
            new.save_pretrained(tmp_path / "fresh", max_shard_bytes=60_000)
    assert not list((tmp_path / "fresh").iterdir())


def test_only_leftovers_of_our_own_saves_are_swept_first(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    swept = ["model-0123abcd-00001-of-00002.safetensors", ".saving-0123abcd"]
    kept = ["model-00001-of-00002.safetensors", ".hidden", ".saving-notes"]
    (tmp_path / swept[1]).mkdir()
    (tmp_path / swept[1] / ".tmpAb12").write_bytes(b"")
    for name in swept[:1] + kept:
        (tmp_path / name).write_bytes(b"")
    before = {p.name for p in tmp_path.iterdir()} - set(swept)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    assert {p.name for p in tmp_path.iterdir()} == before
    (tmp_path / swept[0]).write_bytes(b"")
    (tmp_path / INDEX_NAME).write_text("damaged")
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    assert {p.name for p in tmp_path.iterdir()} == before | {swept[0]}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_the_umask(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_bad_arguments_of_saving(model, tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1, got 0"):
        model.save_pretrained(tmp_path, max_shard_bytes=0)
    with pytest.raises(ValueError, match="got the meta device"):
        KimiK2(KimiK2Config.tiny(), device="meta").save_pretrained(tmp_path / "meta")
    assert not (tmp_path / "meta").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="save_pretrained: folder: expected"):
        model.save_pretrained(tmp_path / "file")
