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

from kimi_ops.models.kimi_k2.decoder import Decoder
from kimi_ops.models.kimi_k2.expert_ranks import to_first
from kimi_ops.models.kimi_k2.files import staging, sync_folder
from kimi_ops.models.kimi_k2.layers import check_dtype
from kimi_ops.models.kimi_k2.layout import Entry, whole
from kimi_ops.models.kimi_k2.shards import INDEX_NAME, SINGLE_NAME

__all__ = ["save"]

_SHARD = re.compile(r"model-[0-9a-f]{8}-\d{5,}-of-\d{5,}\.safetensors")


class _Source(NamedTuple):
    """A tensor of the checkpoint, and how it comes to the host of the rank that writes."""

    name: str
    nbytes: int
    fetch: Callable[[], Tensor | None]


def save(
    model: Decoder,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    stages: dist.ProcessGroup | None = None,
) -> None:
    """Write ``config.json`` and the weights; see `KimiK2.save_pretrained`. `stages`: a rank of each
    stage, of which `model` is one."""
    if max_shard_bytes < 1:
        raise ValueError(
            f"save_pretrained: max_shard_bytes: expected at least 1, got {max_shard_bytes}; "
            "raise it"
        )
    weight = next(model.parameters())
    if weight.is_meta:
        raise ValueError(
            "save_pretrained: model: expected allocated weights, got the meta device; call "
            "allocate and init_weights or from_pretrained first"
        )
    if model.experts_form is not None:
        raise ValueError(
            f"save_pretrained: model: expected plain experts, got {model.experts_form}, which the "
            "checkpoint it came from holds already; load it with experts=None to convert it"
        )
    check_dtype("save_pretrained", weight.dtype)
    sources = [_Source(e.name, e.tensor.nbytes, partial(_joined, model, e)) for e in _held(model)]
    writes = model.expert_ranks is None or model.expert_ranks.rank == 0
    if writes and stages is not None:
        sources = _of_all(stages, sources, model)
        writes = dist.get_rank(stages) == 0
    if not writes:
        for source in sources:
            source.fetch()  # sends
        return
    folder = Path(folder)
    values = model.config.to_dict()
    values["torch_dtype"] = str(weight.dtype).removeprefix("torch.")
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


def _held(model: Decoder) -> Iterator[Entry]:
    """What this rank takes part in bringing to the one that writes: there all of the model."""
    ranks = model.expert_ranks
    for entry in whole(model).entries():
        if ranks is None or ranks.rank in (0, entry.owner):
            yield entry


def _joined(model: Decoder, entry: Entry) -> Tensor | None:
    """A tensor on the host of the first of the ranks that share the experts; the others send."""
    tensor = entry.tensor.detach()
    if model.expert_ranks is None or entry.owner is None:
        return tensor.cpu()
    return model.expert_ranks.to_first(tensor, entry.owner)


def _of_all(stages: dist.ProcessGroup, sources: list[_Source], model: Decoder) -> list[_Source]:
    """The tensors of all stages on the first; on the others their own, which they send."""
    mine = [(e.name, e.tensor.shape, e.tensor.dtype) for e in whole(model).entries()]
    told: list[Any] = [None] * dist.get_world_size(stages)
    dist.all_gather_object(told, mine, group=stages)
    device = next(model.parameters()).device
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
