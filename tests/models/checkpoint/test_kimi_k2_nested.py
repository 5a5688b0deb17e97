# SPDX-License-Identifier: MIT
"""Folders of models that see: the language model of Kimi K2.5, without its vision tower."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, load_layer
from kimi_ops.models.kimi_k2.chat import load_tokenizer
from kimi_ops.models.kimi_k2.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from kimi_ops.models.kimi_k2.rope import rotary_tables

IDS = torch.arange(12).view(2, 6)


def write(folder: Path, limit: int = 10**9) -> KimiK2:
    """A folder as Kimi K2.5 was released, of a small model, which is returned."""
    model = KimiK2(KimiK2Config.tiny())
    with torch.no_grad():
        for moe in model.moe_layers():
            moe.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    model.save_pretrained(folder, max_shard_bytes=limit)
    for path in folder.glob("*.safetensors"):
        tensors = {f"language_model.{name}": value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    seen = {"vision_tower.patch_embed.proj.bias": torch.ones(16)}
    seen["mm_projector.pre_norm.weight"] = torch.ones(16)
    index = folder / INDEX_NAME
    if index.exists():
        said = json.loads(index.read_text())
        map_, total = said["weight_map"], said["metadata"]["total_size"] + 2 * 16 * 4
        map_ = {f"language_model.{name}": file for name, file in map_.items()}
        save_file(seen, folder / "vision.safetensors", metadata={"format": "pt"})
        map_ |= dict.fromkeys(seen, "vision.safetensors")
        index.write_text(json.dumps({"weight_map": map_, "metadata": {"total_size": total}}))
    else:
        save_file(load_file(path) | seen, path, metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "kimi_k2"}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    whole = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {**tower, "num_attention_heads": 2, "patch_size": 2},
        "projection_hidden_size": 16,
        "tie_word_embeddings": False,
        "media_placeholder_token_id": 63,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    return model


def edit(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@torch.no_grad()
@pytest.mark.parametrize("limit", [10**9, 70_000])
@pytest.mark.filterwarnings("error::UserWarning")
def test_the_text_part_is_what_it_is_alone(tmp_path, limit):
    written = write(tmp_path / "whole", limit)
    assert (tmp_path / "whole" / INDEX_NAME).exists() == (limit < 10**9)
    model = KimiK2.from_pretrained(tmp_path / "whole", text_only=True)
    assert torch.equal(model(IDS), written(IDS))

    x, tables = torch.randn(1, 5, 32), rotary_tables(model.config, torch.arange(5)[None])
    layer = load_layer(tmp_path / "whole", 1, text_only=True)
    assert torch.equal(layer(x, *tables), written.model.layers[1](x, *tables))

    model.save_pretrained(tmp_path / "text")  # a language model alone
    assert torch.equal(KimiK2.from_pretrained(tmp_path / "text")(IDS), written(IDS))


@torch.no_grad()
def test_transformers_computes_the_same_of_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    written = write(tmp_path)
    theirs = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(written(IDS), theirs.eval()(input_ids=IDS).logits)


def test_the_tower_is_left_out_by_request_alone(tmp_path):
    write(tmp_path)
    said = "text_config: expected a language model alone, .*'kimi_k25'; text_only=True .*vision"
    with pytest.raises(ValueError, match=said):
        KimiK2.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_layer(tmp_path, 1)
    with pytest.raises(ValueError, match="files or a model of 256|a vocabulary of 64"):
        load_tokenizer(tmp_path)  # which knows the size of the vocabulary
    KimiK2(KimiK2Config.tiny()).save_pretrained(tmp_path / "plain")
    assert KimiK2.from_pretrained(tmp_path / "plain", text_only=True).config.vocab_size == 64


def test_other_tensors_are_refused_by_name(tmp_path):
    write(tmp_path)
    tensors = load_file(tmp_path / SINGLE_NAME)
    assert {"vision_tower.patch_embed.proj.bias", "language_model.lm_head.weight"} <= tensors.keys()
    save_file(tensors | {"audio_tower.weight": torch.zeros(1)}, tmp_path / SINGLE_NAME)
    with pytest.raises(ValueError, match=r"from_pretrained: audio_tower\.weight: expected names"):
        KimiK2.from_pretrained(tmp_path, text_only=True)
    save_file(tensors | {"language_model.model.extra": torch.zeros(1)}, tmp_path / SINGLE_NAME)
    with pytest.raises(ValueError, match=r"with model\.extra; use the config"):
        KimiK2.from_pretrained(tmp_path, text_only=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "kimi_k3"}, r"model_type: expected one of \['kimi_k25'\] beside text_"),
        ({"text_config": [1]}, r"text_config: expected a dict, got \[1\]"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False, as text_config says"),
        ({"answer": 42}, "answer: expected only fields that this model knows, got 42"),
        ({"eos_token_id": 64}, r"eos_token_id: expected ids in 0 \.\. 63"),
    ],
)
def test_what_stands_beside_the_text_is_not_ignored(tmp_path, values, message):
    write(tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(ValueError, match=f"KimiK2Config: {message}.*config.json"):
        KimiK2.from_pretrained(tmp_path, text_only=True)


def test_what_the_text_leaves_open_the_whole_says():
    text = KimiK2Config.tiny().to_dict()
    del text["torch_dtype"]
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    whole = {"model_type": "kimi_k25", "text_config": text, "quantization_config": fp8}
    ids = {"eos_token_id": [3, 5], "pad_token_id": 7}
    config = KimiK2Config.from_dict(whole | ids | {"dtype": "float16"}, text_only=True)
    assert config.quantization_config == fp8 and config.torch_dtype == "float16"
    assert (config.eos_token_id, config.pad_token_id) == ([3, 5], 7)
    assert config.hidden_size == 32 and config.model_type == "kimi_k2"


def test_an_id_that_the_whole_leaves_open_is_the_text_s(tmp_path: Path):
    """A null beside text_config says nothing: generation would never end."""
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    edit(tmp_path, text_config=config["text_config"], eos_token_id=None)
    model = KimiK2.from_pretrained(tmp_path, text_only=True)
    assert model.config.eos_token_id == 5
