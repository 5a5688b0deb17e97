# SPDX-License-Identifier: MIT
"""Hugging Face checkpoints: ``config.json`` and safetensors, one tensor for each expert matrix.

In memory the experts of a layer are two stacks; in a file every expert has its own gate_proj,
up_proj and down_proj. `checkpoint_tensors` pairs the file's names with views of the stacks, for
writing and for reading. Where ranks share the experts, each reads its own and rank 0 writes all.
FP8 and INT4 matrices are dequantised on loading, unless the model keeps its experts in that form.
"""

import json
import re
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kimi_ops.formats import FP8_BLOCK, INT4_WORD
from kimi_ops.models.kimi_k2 import stored
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.decoder import Decoder
from kimi_ops.models.kimi_k2.files import staging, sync_folder
from kimi_ops.models.kimi_k2.layers import check_dtype
from kimi_ops.models.kimi_k2.quantization import fp8_block
from kimi_ops.models.kimi_k2.quantized_experts import FORMS, QuantizedExperts
from kimi_ops.models.kimi_k2.shards import INDEX_NAME, SINGLE_NAME, Shards

__all__ = ["checkpoint_tensors", "keep_quantized", "load_weights", "save"]

_STACK = re.compile(r"(.+\.experts\.)(gate_up|down)_(proj|weight\w*)")
_SHARD = re.compile(r"model-[0-9a-f]{8}-\d{5,}-of-\d{5,}\.safetensors")


class _Entry(NamedTuple):
    """A tensor of a checkpoint: its name, a view of the model's memory, which expert rank has it.

    Where that is not this one, the view is of another expert, which has the shape and the dtype.
    """

    name: str
    tensor: Tensor
    owner: int | None  # None: every rank has it


def _entries(model: Decoder) -> Iterator[_Entry]:
    """All tensors of a checkpoint, in its order."""
    ranks = model.expert_ranks
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stack = _STACK.fullmatch(name)
        if stack is None:
            yield _Entry(name, tensor, None)
            continue
        prefix, kind, suffix = stack.groups()
        suffix = "weight" if suffix == "proj" else suffix
        here = range(len(tensor)) if ranks is None else ranks.experts
        for expert in range(model.config.n_routed_experts):
            owner = None if ranks is None else ranks.owner(expert)
            matrix = tensor[expert - here.start if expert in here else 0]
            if kind == "down":
                yield _Entry(f"{prefix}{expert}.down_proj.{suffix}", matrix, owner)
            else:
                gate, up = matrix.chunk(2)
                yield _Entry(f"{prefix}{expert}.gate_proj.{suffix}", gate, owner)
                yield _Entry(f"{prefix}{expert}.up_proj.{suffix}", up, owner)


def checkpoint_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, view of the model's memory) of every tensor that this process has."""
    ranks = model.expert_ranks
    for name, tensor, owner in _entries(model):
        if owner is None or (ranks is not None and owner == ranks.rank):
            yield name, tensor


def save(model: Decoder, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write ``config.json`` and the weights; see `KimiK2.save_pretrained`."""
    if max_shard_bytes < 1:
        raise ValueError(
            f"save_pretrained: max_shard_bytes: expected at least 1, got {max_shard_bytes}; "
            "raise it"
        )
    if model.lm_head.weight.is_meta:
        raise ValueError(
            "save_pretrained: model: expected allocated weights, got the meta device; call "
            "allocate and init_weights or from_pretrained first"
        )
    if model.experts_form is not None:
        raise ValueError(
            f"save_pretrained: model: expected plain experts, got {model.experts_form}, which the "
            "checkpoint it came from holds already; load it with experts=None to convert it"
        )
    check_dtype("save_pretrained", model.lm_head.weight.dtype)
    folder = Path(folder)
    plan = _plan_shards(model, max_shard_bytes)
    if model.expert_ranks is not None and model.expert_ranks.rank != 0:
        _send(model)
        return
    values = model.config.to_dict()
    values["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    values["model_type"] = "deepseek_v3"  # the same network, by the name that transformers knows
    values.pop("auto_map", None)  # names code that is not written beside it
    values.pop("quantization_config", None)  # what is written is not quantised
    try:
        _write(model, folder, plan, json.dumps(values, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save_pretrained: folder: expected a place to write {folder}, got {error}; free "
            "space or choose another folder (a checkpoint that was there is still whole)"
        ) from error


def _plan_shards(model: Decoder, limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors; one tensor above the limit gets a file of its own.

    Every plan has its own file names: the shards of two saves never mix, and an index that is
    there keeps its files until another replaces it.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor, _ in _entries(model):
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    prefix, total = f"model-{secrets.token_hex(4)}", len(shards)
    return {f"{prefix}-{n:05d}-of-{total:05d}.safetensors": s for n, s in enumerate(shards, 1)}


def _write(model: Decoder, folder: Path, plan: dict[str, list[str]], config: str) -> None:
    """Everything under new names, then the one rename or removal that makes readers see it."""
    _remove_orphans(folder)
    entries = {entry.name: entry for entry in _entries(model)}
    total = sum(entry.tensor.nbytes for entry in entries.values())
    with staging(folder) as stage:
        if not _holds(folder / "config.json", config):
            stage.write("config.json", lambda path: _write_text(path, config))
        for file, names in plan.items():
            # of the other ranks' experts no more than a file's are here at once
            content = {name: _whole(model, entries[name]).contiguous() for name in names}
            stage.write(file, partial(save_file, content, metadata={"format": "pt"}))
        if len(plan) > 1:
            weight_map = {name: file for file, names in plan.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            stage.write(INDEX_NAME, lambda path: _write_text(path, text))
    if len(plan) == 1 and (folder / INDEX_NAME).exists():
        (folder / INDEX_NAME).unlink()  # an index goes before a single file: now readers see it
        sync_folder(folder)
    stale = {SINGLE_NAME, *(path.name for path in folder.glob("model-*-of-*.safetensors"))}
    for name in stale - plan.keys():
        (folder / name).unlink(missing_ok=True)


def _whole(model: Decoder, entry: _Entry) -> Tensor:
    """A tensor on the host of rank 0, which writes; the others call `_send`."""
    if model.expert_ranks is None or entry.owner is None:
        return entry.tensor.detach().cpu()
    found = model.expert_ranks.to_first(entry.tensor.detach(), entry.owner)
    assert found is not None
    return found


def _send(model: Decoder) -> None:
    """This rank's experts to rank 0, in the order of the files."""
    assert model.expert_ranks is not None
    for _, tensor, owner in _entries(model):
        if owner == model.expert_ranks.rank:
            model.expert_ranks.to_first(tensor.detach(), owner)


def _remove_orphans(folder: Path) -> None:
    """Remove shards that a save renamed before it died: of our names, but in no index."""
    ours = [path for path in folder.glob("model-*-of-*.safetensors") if _SHARD.fullmatch(path.name)]
    index = folder / INDEX_NAME
    try:
        named = index.read_text(encoding="utf-8") if index.exists() else ""
    except ValueError:
        return  # a damaged index: its shards may be worth a rescue
    if index.exists() and '"weight_map"' not in named:
        return
    for path in ours:
        if path.name not in named:
            path.unlink(missing_ok=True)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (FileNotFoundError, ValueError):
        return False


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def keep_quantized(model: Decoder, form: str) -> None:
    """Give a model on the meta device experts of `form` instead of plain ones."""
    op, config = "from_pretrained", model.config
    if model.expert_ranks is not None:
        raise ValueError(
            f"{op}: experts: expected None beside expert_ranks, got {form!r}; quantised experts "
            "are served by one process"
        )
    if form not in FORMS:
        raise ValueError(
            f"{op}: experts: expected one of {sorted(FORMS)} or None, got {form!r}; choose one"
        )
    width, hidden = config.moe_intermediate_size, config.hidden_size
    if form == "fp8" and width % FP8_BLOCK:
        raise ValueError(
            f"{op}: experts: expected moe_intermediate_size as a multiple of {FP8_BLOCK} beside "
            f"'fp8', since gate and up share a grid of scales, got {width}; use experts=None"
        )
    if form == "int4" and (width % INT4_WORD or hidden % INT4_WORD):
        raise ValueError(
            f"{op}: experts: expected hidden_size and moe_intermediate_size as multiples of "
            f"{INT4_WORD} beside 'int4', got {hidden} and {width}; use experts=None"
        )
    for moe in model.moe_layers():
        moe.experts = QuantizedExperts(config, form, device=torch.device("meta"))


@torch.no_grad()
def load_weights(
    model: Decoder, folder: str | Path, *, device: torch.device | str | None = None
) -> None:
    """Read every tensor of `model` from the safetensors in `folder`, converting dtypes.

    All names and shapes are compared before memory is allocated or a value is written.

    Parameters
    ----------
    model : Decoder
        One on the meta device is allocated on `device` first.
    folder : path
    device : torch.device or str, optional

    Raises
    ------
    ValueError
        A file that is missing, truncated or no safetensors; a tensor that is missing, unknown or
        has another shape.
    """
    config = model.config
    block = fp8_block(config.quantization_config)
    with Shards(Path(folder)) as shards:
        forms = _compare(model, shards, block)
        if model.lm_head.weight.is_meta:
            model.allocate(device or "cpu")
        for name, target in checkpoint_tensors(model):
            if name in forms:
                value = stored.read(name, forms[name], list(target.shape), shards, block)
            else:  # of experts that are kept as they are
                value = stored.scales(name, shards)
            target.copy_(value)


def _ignored(name: str, config: KimiK2Config) -> bool:
    """Tensors of old checkpoints that carry nothing: rotary tables, multi-token prediction."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    parts = name.split(".")
    is_layer = name.startswith("model.layers.") and parts[2].isdecimal()
    return is_layer and int(parts[2]) >= config.num_hidden_layers


def _compare(model: Decoder, shards: Shards, block: tuple[int, int]) -> dict[str, str]:
    """Refuse a checkpoint of another model; the forms of the tensors that are to be converted."""
    shapes: dict[str, list[int]] = {}  # of matrices, also of those that stay packed
    kept: set[str] = set()
    for name, target, _ in _entries(model):
        if name.endswith(("weight_scale_inv", "weight_scale")):
            continue  # of a matrix that is kept, which is checked with it
        if target.dtype in (torch.float8_e4m3fn, torch.int32):
            words = INT4_WORD if name.endswith("_packed") else 1
            name = name.removesuffix("_packed")
            kept.add(name)
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
        if name not in shapes and name not in companions and not _ignored(name, model.config)
    ]
    if unknown:
        raise _mismatch("only tensors of the model", "with", unknown, shards.folder)
    forms = {name: form for name, form in found.items() if form is not None}
    for name in kept:
        _check_kept(name, forms[name], str(model.experts_form), shards, shapes[name], block)
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
