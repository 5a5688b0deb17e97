# SPDX-License-Identifier: MIT
"""What a matrix may be stored as: every form that is read gives its values, the rest is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.checkpoint import shards
from kimi_ops.models.kimi_k2.checkpoint.shards import SINGLE_NAME

NAME = "model.layers.0.self_attn.o_proj.weight"  # [32, 24]
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    KimiK2(KimiK2Config.tiny()).save_pretrained(path)
    return path


def written(folder, tmp_path, change, block=(8, 12)):
    """The folder of a checkpoint after change(tensors)."""
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE_NAME)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def values(dtype) -> torch.Tensor:
    numbers = torch.randn(32, 24, generator=torch.Generator().manual_seed(3))
    return (numbers * 40).round().clamp(-127, 127).to(dtype)


SERVED = {
    "fp8 blocks": (E4M3, "_scale_inv", [4, 2], torch.float32),
    "fp8 blocks, bf16 scales": (E4M3, "_scale_inv", [4, 2], torch.bfloat16),
    "fp8 blocks, exponents": (E4M3, "_scale_inv", [4, 2], E8M0),
    "fp8 blocks, bytes of exponents": (E4M3, "_scale_inv", [4, 2], torch.uint8),
    "fp8 matrix": (E4M3, "_scale", [], torch.float32),
    "fp8 matrix, one number": (E4M3, "_scale", [1], torch.bfloat16),
    "fp8 rows": (E4M3, "_scale", [32, 1], torch.float32),
    "fp8 rows, flat": (E4M3, "_scale_inv", [32], torch.float32),
    "int8 blocks": (torch.int8, "_scale_inv", [4, 2], torch.float32),
    "int8 rows": (torch.int8, "_scale", [32, 1], torch.bfloat16),
}


@pytest.mark.parametrize("slab", [2 << 20, 300, 1], ids="slab {}".format)
@pytest.mark.parametrize(("dtype", "suffix", "shape", "kind"), SERVED.values(), ids=SERVED.keys())
def test_every_form_that_is_read(folder, tmp_path, monkeypatch, slab, dtype, suffix, shape, kind):
    """Whole, or in pieces of 12 rows or less, which are whole blocks."""
    monkeypatch.setattr(shards, "_SLAB", slab)
    weight = values(dtype)
    exponents = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(4))
    factors = torch.ldexp(torch.ones(shape), exponents)
    scale = (exponents + 127).to(torch.uint8) if kind in (E8M0, torch.uint8) else factors.to(kind)
    scale = scale.view(E8M0) if kind == E8M0 else scale
    stored = written(folder, tmp_path, lambda t: t.update({NAME: weight, f"{NAME}{suffix}": scale}))

    expected = torch.empty(32, 24)
    for row in range(32):
        for column in range(24):
            if len(shape) == 2 and shape[1] == 2:
                factor = factors[row // 8, column // 12]
            else:
                factor = factors.flatten()[row if factors.numel() > 1 else 0]
            expected[row, column] = weight[row, column].float() * factor
    with torch.device("meta"):  # a default device is for what is new, not for files
        model = KimiK2.from_pretrained(stored)
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, expected)


def test_a_block_size_of_null_is_a_scale_for_the_matrix(folder, tmp_path):
    pair = {NAME: values(E4M3), f"{NAME}_scale_inv": torch.tensor(0.5)}
    model = KimiK2.from_pretrained(written(folder, tmp_path, lambda t: t.update(pair), None))
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, pair[NAME].float() / 2)


BLOCKS = torch.ones(4, 2)
REFUSED = {
    "e5m2": ({"": values(torch.float8_e5m2), "_scale_inv": BLOCKS}, "weight: .* got F8_E5M2"),
    "uint8": ({"": values(torch.uint8), "_scale_inv": BLOCKS}, "weight: .* got U8"),
    "int64": ({"": values(torch.int64)}, "weight: .* got I64"),
    "int32": ({"": values(torch.int32)}, "weight: .* got I32"),
    "bool": ({"": values(torch.bool)}, "weight: .* got BOOL"),
    "exponents": ({"": torch.ones(32, 24).to(E8M0)}, "weight: .* got F8_E8M0"),
    "fp8 alone": ({"": values(E4M3)}, "weight_scale_inv: expected scales beside F8_E4M3 weights"),
    "int8 alone": ({"": values(torch.int8)}, "weight_scale_inv: expected scales beside I8 weights"),
    "scale of plain weights": (
        {"_scale_inv": BLOCKS},
        "weight_scale_inv: expected no .* beside F32",
    ),
    "other scale of plain weights": (
        {"_scale": BLOCKS},
        "weight_scale: expected no such .* beside F32",
    ),
    "two scales": (
        {"": values(E4M3), "_scale_inv": BLOCKS, "_scale": torch.ones(1)},
        "weight_scale: expected no such tensor beside F8_E4M3",
    ),
    "packed beside plain": (
        {"_packed": torch.zeros(32, 3, dtype=torch.int32), "_scale": torch.ones(32, 1)},
        "weight_packed: expected no such tensor beside F32",
    ),
    "scale beside packed": (
        {
            "": None,
            "_packed": torch.zeros(32, 3, dtype=torch.int32),
            "_scale": torch.ones(32, 1),
            "_scale_inv": BLOCKS,
        },
        "weight_scale_inv: expected no such tensor beside packed ones",
    ),
    "another grid": (
        {"": values(E4M3), "_scale_inv": torch.ones(2, 4)},
        r"weight_scale_inv: expected shape \[4, 2\] for blocks of \[8, 12\], .* got \[2, 4\]",
    ),
    "whole scales": (
        {"": values(E4M3), "_scale_inv": torch.ones(4, 2, dtype=torch.int32)},
        "weight_scale_inv: expected BF16 or .* got I32",
    ),
    "fp8 scales": (
        {"": values(E4M3), "_scale_inv": BLOCKS.to(E4M3)},
        "weight_scale_inv: expected BF16 or .* got F8_E4M3",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_the_rest_is_refused_by_name(folder, tmp_path, monkeypatch, tensors, message):
    def change(stored):
        for suffix, value in tensors.items():
            if value is None:
                stored.pop(f"{NAME}{suffix}")
            else:
                stored[f"{NAME}{suffix}"] = value

    monkeypatch.setattr(KimiK2, "allocate", None)  # refused before memory is asked for
    with pytest.raises(
        ValueError, match=f"from_pretrained: model.layers.0.self_attn.o_proj.{message}"
    ):
        KimiK2.from_pretrained(written(folder, tmp_path, change))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_vectors_are_plain(folder, tmp_path, name):
    def change(stored):
        stored[name] = torch.ones_like(stored[name]).to(torch.int8)

    with pytest.raises(ValueError, match=f"{name}.*: expected .*I8"):
        KimiK2.from_pretrained(written(folder, tmp_path, change))
