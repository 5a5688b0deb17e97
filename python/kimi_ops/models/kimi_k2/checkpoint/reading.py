# SPDX-License-Identifier: MIT
"""Reading the tensors of a Hugging Face checkpoint: all are compared, then memory, then values.

Values pass a few MiB at a time: beside the model and the mapped files no tensor is whole in memory.
FP8 and INT4 matrices are dequantised on the way, unless the model keeps its experts in that form.
What fails leaves no memory behind.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from kimi_ops.formats import FP8_BLOCK, INT4_WORD
from kimi_ops.models.kimi_k2.checkpoint import stored
from kimi_ops.models.kimi_k2.checkpoint.layout import Part
from kimi_ops.models.kimi_k2.checkpoint.shards import Shards
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.config.quantization import fp8_block

__all__ = ["load"]

# What names of a model begin with: others are unknown to whatever part of it.
_PARTS = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load(part: Part, folder: str | Path, allocated: Callable[[], None], *, text_only: bool) -> None:
    """Compare a part on the meta device with the files of `folder`, let `allocated` give it memory,
    and read its tensors, those of a file from its front to its back."""
    with Shards(Path(folder), part.own, text_only=text_only) as shards:
        _load(part, shards, allocated)


@torch.no_grad()
def _load(part: Part, shards: Shards, allocated: Callable[[], None]) -> None:
    block = fp8_block(part.config.quantization_config)
    forms = _compare(part, shards, block)
    if part.config.tie_word_embeddings and {_HEAD, _EMBEDDING} <= set(shards.names()):
        _check_tied(shards)
    try:
        allocated()
        targets = part.tensors()

        def place(name: str) -> tuple[Path, int]:
            return shards.place(f"{name}_packed" if forms.get(name) == "int4" else name)

        for name in sorted(targets, key=place):
            target = targets[name]
            values: Iterable[tuple[int, Tensor]]
            if name in forms:
                values = stored.read(name, forms[name], list(target.shape), shards, block)
            elif name.endswith(stored.SCALES):  # of experts that are kept as they are
                values = [(0, stored.scales(name, shards))]
            else:
                values = shards.slabs(name)
            for first, value in values:
                value = value.to(target.dtype)
                stored.check_finite(name, first, value, shards)
                target[first : first + len(value)].copy_(value)
    except BaseException:
        part.module.to("meta")  # whoever holds the error holds the model, but no memory
        raise


def _check_tied(shards: Shards) -> None:
    """Refuse a head of its own in the files of a model whose config ties it to the embedding."""
    fits = shards.header(_HEAD) == shards.header(_EMBEDDING) and all(
        torch.equal(head[1].view(torch.uint8), embedding[1].view(torch.uint8))
        for head, embedding in zip(shards.slabs(_HEAD), shards.slabs(_EMBEDDING), strict=True)
    )
    if not fits:
        raise ValueError(
            f"from_pretrained: {_HEAD}: expected the values of {_EMBEDDING}, as "
            f"tie_word_embeddings says, got others in {shards.place(_HEAD)[0]}; correct config.json"
        )


def _ignored(name: str, config: KimiK2Config) -> bool:
    """Tensors that carry nothing: rotary tables, multi-token prediction, a head that is tied."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name == _HEAD and config.tie_word_embeddings:
        return True
    parts = name.split(".")
    is_layer = name.startswith("model.layers.") and parts[2].isdecimal()
    return is_layer and int(parts[2]) >= config.num_hidden_layers


def _compare(part: Part, shards: Shards, block: tuple[int, int]) -> dict[str, str]:
    """Refuse a checkpoint of another model; the forms of the tensors that are to be converted."""
    shapes: dict[str, list[int]] = {}  # of matrices, also of those that stay packed
    kept: dict[str, str] = {}  # name -> form
    for name, target, _ in part.entries():
        if name.endswith(stored.SCALES):
            continue  # of a matrix that is kept, which is checked with it
        if target.dtype in (torch.float8_e4m3fn, torch.int32):
            words, form = (1, "fp8") if target.dtype == torch.float8_e4m3fn else (INT4_WORD, "int4")
            name = name.removesuffix("_packed")
            kept[name] = form
            shapes[name] = [target.shape[0], words * target.shape[1]]
        else:
            shapes[name] = list(target.shape)
    found = {name: stored.find(name, shards) for name in shapes}
    missing = [name for name, form in found.items() if form is None]
    if missing:
        raise _mismatch("every tensor of the model", "without", missing, shards.folder)
    companions = {f"{name}{suffix}" for name in shapes for suffix in stored.COMPANIONS}
    unknown = [
        name
        for name in shards.names()
        if (name.startswith(part.own) or not name.startswith(_PARTS))
        and name not in shapes
        and name not in companions
        and not _ignored(name, part.config)
    ]
    if unknown:
        raise _mismatch("only tensors of the model", "with", unknown, shards.folder)
    forms = {name: form for name, form in found.items() if form is not None}
    for name in kept:
        _check_kept(name, forms[name], kept[name], shards, shapes[name], block)
    for name, form in forms.items():
        stored.check(name, form, shapes[name], shards, block)
    return {name: form for name, form in forms.items() if name not in kept}


def _check_kept(
    name: str, form: str, wanted: str, shards: Shards, shape: list[int], block: tuple[int, int]
) -> None:
    """Refuse experts that cannot be kept as the caller asked for."""
    came = form
    if form == "fp8" and block != (FP8_BLOCK, FP8_BLOCK):
        came = f"fp8 in blocks of {list(block)}, not {FP8_BLOCK} x {FP8_BLOCK}"
    elif form == "fp8" and not stored.in_blocks(name, shards, shape, block):
        came = f"fp8 without a {name}_scale_inv for blocks of {FP8_BLOCK} x {FP8_BLOCK}"
    elif form == "int4" and f"{name}_scale" in shards:
        dtype = shards.header(f"{name}_scale")[1]
        came = form if dtype == "BF16" else f"int4 with {dtype} scales, not BF16"
    if came != wanted:
        raise ValueError(
            f"from_pretrained: experts: expected {name} stored as {wanted}, got {came}; use "
            "experts=None to convert, or the form of this checkpoint"
        )


def _mismatch(expected: str, with_or_without: str, names: list[str], folder: Path) -> ValueError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ValueError(
        f"from_pretrained: folder: expected {expected}, got {folder} {with_or_without} {shown}; "
        "use the config.json that belongs to these files"
    )
