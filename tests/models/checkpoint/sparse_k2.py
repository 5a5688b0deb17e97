# SPDX-License-Identifier: MIT
"""Checkpoints of Kimi K2 at its real size that take a few MB of a disk.

Names, shapes, dtypes and files are those of the releases: Kimi-K2-Instruct (FP8 blocks, a layer in
each of 61 files) and Kimi-K2-Thinking (INT4 experts, 62 files). The data are holes, which read as
zeros; `plant` writes a tensor.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kimi_ops.models.kimi_k2 import KimiK2Config

SIZES = {"F32": 4, "I32": 4, "BF16": 2, "F8_E4M3": 1}
QUANTIZATION = {
    "fp8": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True},
            }
        },
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp.*proj.*"],
    },
}
Tensor = tuple[str, str, list[int]]  # name, dtype, shape


def matrix(name: str, rows: int, columns: int, form: str) -> Iterator[Tensor]:
    """The tensors of a matrix that is stored in a form."""
    if form == "fp8":
        yield f"{name}.weight", "F8_E4M3", [rows, columns]
        yield f"{name}.weight_scale_inv", "F32", [-(-rows // 128), -(-columns // 128)]
    elif form == "int4":
        yield f"{name}.weight_packed", "I32", [rows, columns // 8]
        yield f"{name}.weight_scale", "BF16", [rows, columns // 32]
        yield f"{name}.weight_shape", "I32", [2]
    else:
        yield f"{name}.weight", "BF16", [rows, columns]


def swiglu(name: str, width: int, hidden: int, form: str) -> Iterator[Tensor]:
    yield from matrix(f"{name}.gate_proj", width, hidden, form)
    yield from matrix(f"{name}.up_proj", width, hidden, form)
    yield from matrix(f"{name}.down_proj", hidden, width, form)


def layer(n: int, experts: int, form: str) -> Iterator[Tensor]:
    """Layer n of Kimi K2, with fewer experts where wanted."""
    name, rest = f"model.layers.{n}", "fp8" if form == "fp8" else "plain"
    yield f"{name}.input_layernorm.weight", "BF16", [7168]
    yield f"{name}.post_attention_layernorm.weight", "BF16", [7168]
    yield f"{name}.self_attn.q_a_layernorm.weight", "BF16", [1536]
    yield f"{name}.self_attn.kv_a_layernorm.weight", "BF16", [512]
    yield from matrix(f"{name}.self_attn.q_a_proj", 1536, 7168, rest)
    yield from matrix(f"{name}.self_attn.q_b_proj", 64 * 192, 1536, rest)
    yield from matrix(f"{name}.self_attn.kv_a_proj_with_mqa", 576, 7168, rest)
    yield from matrix(f"{name}.self_attn.kv_b_proj", 64 * 256, 512, rest)
    yield from matrix(f"{name}.self_attn.o_proj", 7168, 64 * 128, rest)
    if form == "fp8":
        yield f"{name}.self_attn.rotary_emb.inv_freq", "BF16", [56]
    if n == 0:
        yield from swiglu(f"{name}.mlp", 18432, 7168, rest)
        return
    yield f"{name}.mlp.gate.weight", "BF16", [experts, 7168]
    yield f"{name}.mlp.gate.e_score_correction_bias", "F32", [experts]
    yield from swiglu(f"{name}.mlp.shared_experts", 2048, 7168, rest)
    for expert in range(experts):
        yield from swiglu(f"{name}.mlp.experts.{expert}", 2048, 7168, form)


def files(form: str, experts: int) -> dict[str, list[Tensor]]:
    table = [("model.embed_tokens.weight", "BF16", [163840, 7168])]
    head = [("model.norm.weight", "BF16", [7168]), ("lm_head.weight", "BF16", [163840, 7168])]
    layers = [list(layer(n, experts, form)) for n in range(61)]
    if form == "fp8":
        layers[0] = table + layers[0]
        layers[-1] += head
        return {f"model-{n}-of-61.safetensors": part for n, part in enumerate(layers, 1)}
    parts = enumerate([*layers, table + head], 1)
    return {f"model-{n:05d}-of-000062.safetensors": part for n, part in parts}


def write(folder: Path, form: str, experts: int = 384) -> dict[str, int]:
    """Write the checkpoint; the number of its tensors, of their elements and of their bytes."""
    weight_map, counts = {}, {"tensors": 0, "elements": 0, "bytes": 0}
    for file, tensors in files(form, experts).items():
        header, end, words = {}, 0, []
        shapes = {name: shape for name, _, shape in tensors}
        tensors.sort(key=lambda one: one[2] != [2])  # side by side they take a few pages
        for name, dtype, shape in tensors:
            elements = int(np.prod(shape))
            begin, end = end, end + elements * SIZES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
            counts["tensors"] += 1
            counts["elements"] += elements
            if name.endswith("weight_shape"):
                rows, columns = shapes[name.replace("_shape", "_packed")]
                words.append((begin, struct.pack("<ii", rows, 8 * columns)))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
            for begin, word in words:
                out.seek(8 + len(text) + begin)
                out.write(word)
        counts["bytes"] += end
    index = {"metadata": {"total_size": counts["bytes"]}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = KimiK2Config.k2().to_dict() | {"n_routed_experts": experts}
    config["quantization_config"] = QUANTIZATION[form]
    (folder / "config.json").write_text(json.dumps(config))
    return counts


def plant(folder: Path, name: str, data: bytes) -> None:
    """Write the first bytes of a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with open(folder / index["weight_map"][name], "r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        begin, _ = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin)
        file.write(data)
