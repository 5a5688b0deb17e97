# SPDX-License-Identifier: MIT
"""Checkpoints that lie: every damage is an error by file and tensor, and nothing is half loaded."""

import json
import struct
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, load_layer
from kimi_ops.models.kimi_k2.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from kimi_ops.models.kimi_k2.pretrained import load_weights

NAME = "model.layers.1.mlp.experts.3.up_proj.weight"  # [16, 32] float32
OTHER = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="module")
def model():
    return KimiK2(KimiK2Config.tiny())


def assert_refused(folder, message: str) -> None:
    """By an error that leaves a model on the meta device, as it was."""
    with pytest.raises(ValueError, match=message):
        KimiK2.from_pretrained(folder)
    if (folder / "config.json").exists():
        config = KimiK2Config.from_file(folder / "config.json")
        fresh = KimiK2(config, device="meta")
        with pytest.raises(ValueError, match=f"^from_pretrained: .*{message}"):
            load_weights(fresh, folder, device="cpu")
        assert all(value.is_meta for value in fresh.state_dict().values())


def parts(folder) -> tuple[dict, bytes]:
    """Header and data of a single file."""
    content = (folder / SINGLE_NAME).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(folder, header: bytes, data: bytes, length: int | None = None) -> None:
    size = struct.pack("<Q", len(header) if length is None else length)
    (folder / SINGLE_NAME).write_bytes(size + header + data)


def lie(field: str, change: Callable) -> Callable:
    """Change a field that the header has for NAME."""

    def damage(folder):
        header, data = parts(folder)
        header[NAME][field] = change(header[NAME][field])
        write(folder, json.dumps(header).encode(), data)

    return damage


def shift(by: int) -> Callable:
    return lie("data_offsets", lambda place: [place[0] + by, place[1] + by])


def twice(folder):
    header, data = parts(folder)
    one = json.dumps({NAME: {**header[NAME], "data_offsets": header[OTHER]["data_offsets"]}})[1:-1]
    write(folder, f"{json.dumps(header)[:-1]}, {one}}}".encode(), data)


def content(folder, change: Callable) -> None:
    (folder / SINGLE_NAME).write_bytes(change((folder / SINGLE_NAME).read_bytes()))


def edit(folder, change: Callable) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME)


def header(text: bytes, length: int | None = None) -> Callable:
    return lambda folder: write(folder, text, parts(folder)[1], length)


# What a header may not say is what the library of the format refuses.
HEADER = f"folder: expected .*{SINGLE_NAME} as a whole safetensors file, got .*"
DAMAGE = {
    "truncated": (lambda f: content(f, lambda b: b[:-100]), f"{HEADER}not fully covered"),
    "longer": (lambda f: content(f, lambda b: b + b"x"), f"{HEADER}not fully covered"),
    "header cut": (lambda f: content(f, lambda b: b[:20]), HEADER),
    "empty": (lambda f: content(f, lambda b: b""), f"{HEADER}too small"),
    "absurd header": (header(b"{}", 2**63), f"{HEADER}too large"),
    "no JSON": (header(b"{'a': 1}"), f"{HEADER}invalid JSON"),
    "a list": (header(b"[1]"), f"{HEADER}invalid JSON"),
    "nested": (header(b"[" * 200_000), HEADER),
    "not text": (header(b'{"\xff": 1}'), HEADER),
    "name twice": (twice, f"{HEADER}invalid offset"),
    "no object": (lambda f: write(f, json.dumps({NAME: 3}).encode(), b""), HEADER),
    "dtype": (lie("dtype", lambda _: "Q7"), f"{HEADER}Q7"),
    "other dtype": (lie("dtype", lambda _: "BF16"), HEADER),
    "bits": (lie("dtype", lambda _: "F4"), HEADER),
    "shape": (lie("shape", lambda _: [16, 33]), f"{HEADER}invalid shape"),
    "negative": (lie("shape", lambda _: [-16, -32]), HEADER),
    "no shape": (lie("shape", lambda _: "16x32"), HEADER),
    "huge": (lie("shape", lambda _: [2**62, 2**62]), HEADER),
    "offsets": (lie("data_offsets", lambda _: [0.5, 2]), HEADER),
    "one offset": (lie("data_offsets", lambda p: p[:1]), HEADER),
    "backwards": (lie("data_offsets", lambda p: p[::-1]), HEADER),
    "beyond": (lie("data_offsets", lambda p: [p[0], 10**9]), HEADER),
    "far away": (shift(10**9), HEADER),
    "overlap": (shift(-8), f"{HEADER}invalid offset"),
    "hole": (lambda f: write(f, *dropped(f)), HEADER),
    "no weights": (lambda f: (f / SINGLE_NAME).unlink(), "with neither"),
    "a folder": (lambda f: as_folder(f / SINGLE_NAME), HEADER),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "KimiK2Config: path: .*config.json, which does not exist",
    ),
    "vocabulary": (
        lambda f: configure(f, vocab_size=65),
        r"model.embed_tokens.weight: expected shape \[65, 32\], got \[64, 32\] in .*safetensors",
    ),
    "tied by config alone": (
        lambda f: configure(f, tie_word_embeddings=True),
        "lm_head.weight: expected the values of model.embed_tokens.weight, as tie_word",
    ),
    "missing tensor": (lambda f: edit(f, lambda s: s.pop(NAME)), f"without {NAME}"),
    "wrong shape": (
        lambda f: edit(f, lambda s: s.update({NAME: torch.zeros(4, 5)})),
        rf"{NAME}: expected shape \[16, 32\], got \[4, 5\] in .*{SINGLE_NAME}",
    ),
    "unknown tensor": (
        lambda f: edit(f, lambda s: s.update({"model.wrong": torch.zeros(1)})),
        "with model.wrong",
    ),
    "fp8 without scale": (
        lambda f: edit(f, lambda s: s.update({NAME: s[NAME].to(torch.float8_e4m3fn)})),
        f"{NAME}_scale_inv: .* got no such tensor",
    ),
}


def dropped(folder) -> tuple[bytes, bytes]:
    values, data = parts(folder)
    del values[NAME]
    return json.dumps(values).encode(), data


def as_folder(path) -> None:
    path.unlink()
    path.mkdir()


def configure(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_refused(model, tmp_path, damage, message):
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    assert_refused(tmp_path, message)


def put(value: float, *place: int, name: str = NAME) -> Callable:
    def change(tensors):
        tensors[name][place] = value

    return change


def as_fp8(value: int | float) -> Callable:
    """FP8 with a byte, or a scale, that is `value`."""

    def change(tensors):
        data = tensors[NAME].to(torch.float8_e4m3fn)
        scale = torch.ones(1, 1)
        if isinstance(value, int):
            data.view(torch.uint8)[3, 4] = value
        else:
            scale[0, 0] = value
        tensors.update({NAME: data, f"{NAME}_scale_inv": scale})

    return change


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NOT_FINITE = {
    "nan": (
        put(float("nan"), 3, 4),
        f"{NAME}: .* got nan in float32 at .3, 4., from .*{SINGLE_NAME}",
    ),
    "inf": (put(float("inf"), 15, 31), f"{NAME}: .* got inf in float32 at .15, 31."),
    "-inf": (put(-float("inf"), 2, name=BIAS), f"{BIAS}: .* got -inf in float32 at .2."),
    "fp8": (as_fp8(0x7F), f"{NAME}: expected finite values, got nan in float32 at .3, 4."),
    "-fp8": (as_fp8(0xFF), f"{NAME}: expected finite values, got nan in float32 at .3, 4."),
    "scale": (as_fp8(float("nan")), f"{NAME}: expected finite values, got nan"),
}


@pytest.mark.parametrize(("change", "message"), NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_values_that_are_not_finite_are_named(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    edit(tmp_path, change)
    assert_refused(tmp_path, message)


def test_a_value_that_the_dtype_does_not_hold_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    edit(tmp_path, put(7e4, 0, 0))
    stack = KimiK2.from_pretrained(tmp_path, dtype=torch.bfloat16).moe_layers()[0].experts
    assert stack.gate_up_proj[3, 16, 0].item() == 70144
    with pytest.raises(ValueError, match=f"{NAME}: .* got inf in float16 at .0, 0.*dtype that h"):
        KimiK2.from_pretrained(tmp_path, dtype=torch.float16)


def test_a_value_in_a_later_slab_is_found(tmp_path, monkeypatch):
    """Rows count from the start of the tensor, not of what is read at once."""
    slab = "kimi_ops.models.kimi_k2.checkpoint.shards._SLAB"
    monkeypatch.setattr(slab, 500)  # three rows of 128 bytes
    model = KimiK2(KimiK2Config.tiny())
    model.save_pretrained(tmp_path)
    again = KimiK2.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    edit(tmp_path, put(float("nan"), 13, 2))
    with pytest.raises(ValueError, match="at .13, 2."):
        KimiK2.from_pretrained(tmp_path)


def test_a_head_that_is_a_copy_of_the_embedding_is_tied(model, tmp_path):
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    configure(tmp_path, tie_word_embeddings=True)
    again = KimiK2.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.model.embed_tokens.weight)


def test_a_layer_beside_a_head_that_the_config_ties(model, tmp_path):
    """The embedding is in a file that the layer does not need."""
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    tensors = load_file(tmp_path / SINGLE_NAME)
    (tmp_path / SINGLE_NAME).unlink()
    names = {"one.safetensors": ["model.embed_tokens.weight"]}
    names["two.safetensors"] = [name for name in tensors if name not in names["one.safetensors"]]
    for file, held in names.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    where = {name: file for file, held in names.items() for name in held}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": where}))
    configure(tmp_path, tie_word_embeddings=True)
    assert load_layer(tmp_path, 1).layer == 1
    KimiK2.from_pretrained(tmp_path)


def test_a_file_in_place_of_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json/config.json, which does not exist; pass the"):
        KimiK2.from_pretrained(tmp_path / "config.json")


def other_file(index: dict) -> str:
    return next(f for f in sorted(index["weight_map"].values()) if f != index["weight_map"][NAME])


def into(folder, file: str, **tensors) -> None:
    save_file(load_file(folder / file) | tensors, folder / file)


def moved(folder, index):
    index["weight_map"][NAME] = other_file(index)


def gone(folder, index):
    (folder / index["weight_map"][NAME]).unlink()


def replaced(folder, index):
    save_file({"other": torch.zeros(1)}, folder / index["weight_map"][NAME])


def renamed(folder, index):
    index["weight_map"]["model.unheard"] = index["weight_map"][NAME]


INDEX = {
    "no such file": (gone, r"expected .*/model-.*.safetensors as a whole .*, got No such file"),
    "another file": (replaced, "other: expected it in no file, as .* got it in model-"),
    "in another shard": (moved, rf"{NAME}: expected it in model-.*, as {INDEX_NAME} says"),
    "not in its shard": (renamed, "model.unheard: expected it in model-.* got a file without it"),
    "extra": (
        lambda f, i: into(f, other_file(i), extra=torch.zeros(1)),
        "extra: expected it in no file, as .* got it in model-",
    ),
    "in two shards": (
        lambda f, i: into(f, other_file(i), **{NAME: torch.zeros(16, 32)}),
        rf"{NAME}: expected it in model-.* got it in model-",
    ),
    "no map": (lambda f, i: i.pop("weight_map"), "expected an index with a weight_map"),
    "a list": (lambda f, i: i.update(weight_map=[1]), "expected an index with a weight_map"),
    "a path": (lambda f, i: i["weight_map"].update({NAME: "../secret"}), "no plain files"),
}


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    return tmp_path, json.loads((tmp_path / INDEX_NAME).read_text())


@pytest.mark.parametrize(("damage", "message"), INDEX.values(), ids=INDEX.keys())
def test_an_index_that_disagrees_with_its_files(sharded, damage, message):
    folder, index = sharded
    damage(folder, index)
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert_refused(folder, message)


def test_a_name_that_is_twice_in_the_index(sharded):
    folder, index = sharded
    text = json.dumps(index).replace('"weight_map": {', f'"weight_map": {{"{NAME}": "x", ')
    (folder / INDEX_NAME).write_text(text)
    assert_refused(folder, f"{NAME} is there twice")


@pytest.mark.parametrize("total", [5, "many", None])
def test_a_total_size_that_fits_nothing_is_said(model, sharded, recwarn, total):
    """Writers differ in what they count; every tensor is checked by itself."""
    folder, index = sharded
    index["metadata"]["total_size"] = total
    (folder / INDEX_NAME).write_text(json.dumps(index))
    again = KimiK2.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    said = [one for one in recwarn if "total_size" in str(one.message)]
    assert len(said) == (total is not None)
    if said:
        assert f"got {total!r}; names" in str(said[0].message)
        assert said[0].filename == __file__


def test_a_layer_is_read_from_its_files_alone(model, sharded):
    folder, index = sharded
    others = {f for n, f in index["weight_map"].items() if not n.startswith("model.layers.1.")}
    mine = {f for n, f in index["weight_map"].items() if n.startswith("model.layers.1.")}
    for file in others - mine:
        (folder / file).unlink()
    layer = load_layer(folder, 1)
    theirs = model.model.layers[1].state_dict()
    assert layer.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in layer.state_dict().items())
    with pytest.raises(ValueError, match="got No such file"):
        load_layer(folder, 2)
    with pytest.raises(ValueError, match="load_layer: layer: expected an int of 0 .. 2, got 3"):
        load_layer(folder, 3)
    edit_one(folder / index["weight_map"][NAME], {NAME: torch.full((16, 32), torch.nan)})
    with pytest.raises(ValueError, match=f"{NAME}: expected finite values"):
        load_layer(folder, 1)


def edit_one(path, tensors) -> None:
    save_file(load_file(path) | tensors, path)
