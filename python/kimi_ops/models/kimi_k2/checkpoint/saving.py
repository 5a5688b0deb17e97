# SPDX-License-Identifier: MIT
"""Writing a Hugging Face checkpoint: ``config.json`` and safetensors, as one change of the folder.

Where ranks share the experts or are stages of a pipeline rank 0 writes what all of them have, and
holds no more of it than one file's at a time.

    experts of a stage    to its first rank     then, tensor by tensor,
    all of a stage        to the first rank of the first stage, which writes
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kimi_ops.models.kimi_k2.checkpoint.files import staging, sync_folder
from kimi_ops.models.kimi_k2.checkpoint.layout import Entry, Part
from kimi_ops.models.kimi_k2.checkpoint.shards import INDEX_NAME, SINGLE_NAME

__all__ = ["save", "to_first"]

_SHARD = re.compile(r"model-[0-9a-f]{8}-\d{5,}-of-\d{5,}\.safetensors")


class _Source(NamedTuple):
    """A tensor of the checkpoint, and how it comes to the host of the rank that writes."""

    name: str
    nbytes: int
    fetch: Callable[[], Tensor | None]


def save(
    part: Part,
    folder: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    stages: dist.ProcessGroup | None = None,
) -> None:
    """Write ``config.json``, which names `dtype`, and the tensors of a part. `stages`: a rank of
    each stage, of which `part` is one."""
    if max_shard_bytes < 1:
        raise ValueError(
            f"save_pretrained: max_shard_bytes: expected at least 1, got {max_shard_bytes}; "
            "raise it"
        )
    sources = [_Source(e.name, e.tensor.nbytes, partial(_joined, part, e)) for e in _held(part)]
    writes = part.ranks is None or part.ranks.rank == 0
    if writes and stages is not None:
        sources = _of_all(stages, sources, part)
        writes = dist.get_rank(stages) == 0
    if not writes:
        for source in sources:
            source.fetch()  # sends
        return
    folder = Path(folder)
    values = part.config.to_dict()
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    values["model_type"] = "deepseek_v3"  # the same network, by the name that transformers knows
    values.pop("auto_map", None)  # names code that is not written beside it
    values.pop("quantization_config", None)  # what is written is not quantised
    try:
        _write(folder, sources, max_shard_bytes, json.dumps(values, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save_pretrained: folder: expected a place to write {folder}, got {error}; free "
            "space or choose another folder (a checkpoint that was there is still whole)"
        ) from error


def _held(part: Part) -> Iterator[Entry]:
    """What this rank takes part in bringing to the one that writes: there all of the model."""
    for entry in part.entries():
        if part.ranks is None or part.ranks.rank in (0, entry.owner):
            yield entry


def _joined(part: Part, entry: Entry) -> Tensor | None:
    """A tensor on the host of the first of the ranks that share the experts; the others send."""
    tensor = entry.tensor.detach()
    if part.ranks is None or entry.owner is None:
        return tensor.cpu()
    return part.ranks.to_first(tensor, entry.owner)


def _of_all(stages: dist.ProcessGroup, sources: list[_Source], part: Part) -> list[_Source]:
    """The tensors of all stages on the first; on the others their own, which they send."""
    mine = [(e.name, e.tensor.shape, e.tensor.dtype) for e in part.entries()]
    told: list[Any] = [None] * dist.get_world_size(stages)
    dist.all_gather_object(told, mine, group=stages)
    device = next(part.module.parameters()).device
    rank = dist.get_rank(stages)

    def sends(source: _Source) -> None:
        tensor = source.fetch()
        assert tensor is not None
        to_first(stages, tensor.to(device), rank)

    def comes(shape: torch.Size, dtype: torch.dtype, stage: int) -> Tensor | None:
        return to_first(stages, torch.empty(shape, dtype=dtype, device=device), stage)

    if rank != 0:
        return [source._replace(fetch=partial(sends, source)) for source in sources]
    others = [
        _Source(name, shape.numel() * dtype.itemsize, partial(comes, shape, dtype, stage))
        for stage, tensors in enumerate(told[1:], 1)
        for name, shape, dtype in tensors
    ]
    return sources + others


def to_first(group: dist.ProcessGroup, tensor: Tensor, owner: int) -> Tensor | None:
    """`tensor` as rank `owner` of a group has it, on the host of its rank 0; None on the others,
    which may leave the call out. Elsewhere than on the owner it only says what comes."""
    rank = dist.get_rank(group)
    if rank == 0:
        if owner != 0:
            tensor = torch.empty_like(tensor)
            dist.recv(tensor, dist.get_global_rank(group, owner), group=group)
        return tensor.cpu()
    if rank == owner:
        dist.send(tensor.contiguous(), dist.get_global_rank(group, 0), group=group)
    return None


def _plan_shards(sources: list[_Source], limit: int) -> dict[str, list[_Source]]:
    """File name -> its tensors; one tensor above the limit gets a file of its own.

    Every plan has its own file names: the shards of two saves never mix, and an index that is
    there keeps its files until another replaces it.
    """
    shards: list[list[_Source]] = [[]]
    size = 0
    for source in sources:
        if shards[-1] and size + source.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    prefix, total = f"model-{secrets.token_hex(4)}", len(shards)
    return {f"{prefix}-{n:05d}-of-{total:05d}.safetensors": s for n, s in enumerate(shards, 1)}


def _write(folder: Path, sources: list[_Source], limit: int, config: str) -> None:
    """Everything under new names, then the one rename or removal that makes readers see it."""
    _remove_orphans(folder)
    plan = _plan_shards(sources, limit)
    with staging(folder) as stage:
        if not _holds(folder / "config.json", config):
            stage.write("config.json", lambda path: _write_text(path, config))
        for file, shard in plan.items():
            # of what other ranks have no more than a file's is here at once
            content = {source.name: _fetched(source) for source in shard}
            stage.write(file, partial(save_file, content, metadata={"format": "pt"}))
        if len(plan) > 1:
            weight_map = {source.name: file for file, shard in plan.items() for source in shard}
            total = sum(source.nbytes for source in sources)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            stage.write(INDEX_NAME, lambda path: _write_text(path, text))
    if len(plan) == 1 and (folder / INDEX_NAME).exists():
        (folder / INDEX_NAME).unlink()  # an index goes before a single file: now readers see it
        sync_folder(folder)
    stale = {SINGLE_NAME, *(path.name for path in folder.glob("model-*-of-*.safetensors"))}
    for name in stale - plan.keys():
        (folder / name).unlink(missing_ok=True)


def _fetched(source: _Source) -> Tensor:
    tensor = source.fetch()
    assert tensor is not None
    return tensor.contiguous()


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
