# SPDX-License-Identifier: MIT
"""Writing a Hugging Face checkpoint: ``config.json`` and safetensors, as one change of the folder.

Where ranks share the experts rank 0 writes all of them, and holds those of one file at a time.
"""

import json
import re
import secrets
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kimi_ops.models.kimi_k2.checkpoint.files import staging, sync_folder
from kimi_ops.models.kimi_k2.checkpoint.layout import Entry, Part
from kimi_ops.models.kimi_k2.checkpoint.shards import INDEX_NAME, SINGLE_NAME

__all__ = ["save"]

_SHARD = re.compile(r"model-[0-9a-f]{8}-\d{5,}-of-\d{5,}\.safetensors")


def save(part: Part, folder: str | Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write ``config.json``, which names `dtype`, and the tensors of a part."""
    if max_shard_bytes < 1:
        raise ValueError(
            f"save_pretrained: max_shard_bytes: expected at least 1, got {max_shard_bytes}; "
            "raise it"
        )
    folder = Path(folder)
    plan = _plan_shards(part, max_shard_bytes)
    if part.ranks is not None and part.ranks.rank != 0:
        _send(part)
        return
    values = part.config.to_dict()
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    values["model_type"] = "deepseek_v3"  # the same network, by the name that transformers knows
    values.pop("auto_map", None)  # names code that is not written beside it
    values.pop("quantization_config", None)  # what is written is not quantised
    try:
        _write(part, folder, plan, json.dumps(values, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save_pretrained: folder: expected a place to write {folder}, got {error}; free "
            "space or choose another folder (a checkpoint that was there is still whole)"
        ) from error


def _plan_shards(part: Part, limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors; one tensor above the limit gets a file of its own.

    Every plan has its own file names: the shards of two saves never mix, and an index that is
    there keeps its files until another replaces it.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor, _ in part.entries():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    prefix, total = f"model-{secrets.token_hex(4)}", len(shards)
    return {f"{prefix}-{n:05d}-of-{total:05d}.safetensors": s for n, s in enumerate(shards, 1)}


def _write(part: Part, folder: Path, plan: dict[str, list[str]], config: str) -> None:
    """Everything under new names, then the one rename or removal that makes readers see it."""
    _remove_orphans(folder)
    entries = {entry.name: entry for entry in part.entries()}
    total = sum(entry.tensor.nbytes for entry in entries.values())
    with staging(folder) as stage:
        if not _holds(folder / "config.json", config):
            stage.write("config.json", lambda path: _write_text(path, config))
        for file, names in plan.items():
            # of the other ranks' experts no more than a file's are here at once
            content = {name: _whole(part, entries[name]).contiguous() for name in names}
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


def _whole(part: Part, entry: Entry) -> Tensor:
    """A tensor on the host of rank 0, which writes; the others call `_send`."""
    if part.ranks is None or entry.owner is None:
        return entry.tensor.detach().cpu()
    found = part.ranks.to_first(entry.tensor.detach(), entry.owner)
    assert found is not None
    return found


def _send(part: Part) -> None:
    """This rank's experts to rank 0, in the order of the files."""
    assert part.ranks is not None
    for _, tensor, owner in part.entries():
        if owner == part.ranks.rank:
            part.ranks.to_first(tensor.detach(), owner)


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
