# SPDX-License-Identifier: MIT
"""Reading a Hugging Face checkpoint: everything is compared, then memory, then values.

Values pass a few MiB at a time: beside the model and the mapped files no tensor is whole in memory.
FP8 and INT4 matrices are dequantised on the way, unless the model keeps its experts in that form.
What fails leaves no memory behind.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_ops.formats import FP8_BLOCK, INT4_WORD
from kimi_ops.models.kimi_k2 import stored
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.decoder import Decoder, DecoderLayer, allocate
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.layers import check_dtype
from kimi_ops.models.kimi_k2.layout import Part, whole
from kimi_ops.models.kimi_k2.moe import MoE
from kimi_ops.models.kimi_k2.pipeline import Stage
from kimi_ops.models.kimi_k2.quantization import fp8_block
from kimi_ops.models.kimi_k2.quantized_experts import FORMS, QuantizedExperts
from kimi_ops.models.kimi_k2.shards import Shards

__all__ = ["keep_quantized", "load_layer", "load_stage", "load_weights", "read_config"]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_config(folder: str | Path, dtype: torch.dtype | None) -> tuple[KimiK2Config, torch.dtype]:
    """The configuration in a folder; the dtype of the parameters, by it where None is given."""
    config = KimiK2Config.from_file(Path(folder) / "config.json")
    return config, dtype or getattr(torch, config.torch_dtype or "float32")


def keep_quantized(part: Part, form: str) -> None:
    """Give a part on the meta device experts of `form` instead of plain ones, in eval mode."""
    op, config = "from_pretrained", part.config
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
    here = config.n_routed_experts if part.ranks is None else len(part.ranks.experts)
    for moe in part.module.modules():
        if isinstance(moe, MoE):
            moe.experts = QuantizedExperts(config, here, form, device=torch.device("meta"))
    part.module.eval()


def load_weights(model: Decoder, folder: str | Path, *, device: torch.device | str) -> None:
    """Allocate a model on the meta device and read its tensors from `folder`, converting dtypes.

    All names and shapes are compared before memory is allocated. What fails later, at a value that
    is not finite for example, leaves the model on the meta device.

    Raises
    ------
    ValueError
        A file that is missing, truncated or no safetensors; files that do not fit their index; a
        tensor that is missing, unknown, has another shape or values that are not finite.
    """
    with Shards(Path(folder), model.prefixes) as shards:
        _load(whole(model), shards, lambda: model.allocate(device))


def load_layer(
    folder: str | Path,
    layer: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    experts: str | None = None,
    expert_ranks: ExpertRanks | None = None,
) -> DecoderLayer:
    """One layer of a checkpoint: no other is read, and only the files that hold it are opened.

    Parameters
    ----------
    folder, device, dtype, experts, expert_ranks
        As of `KimiK2.from_pretrained`.
    layer : int
        From 0.

    Returns
    -------
    DecoderLayer
        ``layer(x, cos, sin)`` gives the hidden states [B, S, H] after the layer, for x [B, S, H]
        and the rotary tables of ``rotary_tables(config, positions [B, S])``.

    Raises
    ------
    TypeError, ValueError
        As `KimiK2.from_pretrained`; a layer that the model does not have.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, load_layer
    >>> from kimi_ops.models.kimi_k2.rope import rotary_tables
    >>> config = KimiK2Config.tiny()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     KimiK2(config).save_pretrained(folder)
    ...     layer = load_layer(folder, 1)
    >>> cos, sin = rotary_tables(config, torch.arange(5)[None])
    >>> layer(torch.randn(1, 5, config.hidden_size), cos, sin).shape
    torch.Size([1, 5, 32])
    """
    config, dtype = read_config(folder, dtype)
    if type(layer) is not int or not 0 <= layer < config.num_hidden_layers:
        raise ValueError(
            f"load_layer: layer: expected an int of 0 .. {config.num_hidden_layers - 1}, got "
            f"{layer!r}; choose one of the model's"
        )
    check_dtype("load_layer", dtype)
    module = DecoderLayer(config, layer, expert_ranks, device=torch.device("meta"), dtype=dtype)
    prefix = f"model.layers.{layer}."
    part = Part(module, config, expert_ranks, prefix, prefix)
    if experts is not None:
        keep_quantized(part, experts)
    with Shards(Path(folder), prefix) as shards:
        _load(part, shards, lambda: allocate(module, device))
    return module


def load_stage(
    folder: str | Path,
    layers: range,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    experts: str | None = None,
    expert_ranks: ExpertRanks | None = None,
    **options: Any,
) -> Stage:
    """Some layers of a checkpoint as a stage: only the files that hold its tensors are opened, and
    what is missing or unknown among those of other stages is their own concern.

    Parameters
    ----------
    folder, device, dtype, experts, expert_ranks
        As of `KimiK2.from_pretrained`.
    layers, options
        As of `Stage`.

    Raises
    ------
    TypeError, ValueError
        As `KimiK2.from_pretrained` and `Stage`.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, load_stage
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     KimiK2(KimiK2Config.tiny()).save_pretrained(folder)
    ...     first, last = (load_stage(folder, layers) for layers in (range(2), range(2, 3)))
    >>> last(first(torch.tensor([[1, 2, 3]]))).shape
    torch.Size([1, 3, 64])
    """
    config, dtype = read_config(folder, dtype)
    model = Decoder(config, device="meta", dtype=dtype, expert_ranks=expert_ranks)
    stage = Stage(model, layers, **options)
    if experts is not None:
        keep_quantized(whole(stage), experts)
    load_weights(stage, folder, device=device)
    return stage


@torch.no_grad()
def _load(part: Part, shards: Shards, allocated: Callable[[], None]) -> None:
    """Compare, allocate, read; the tensors of a file from its front to its back."""
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
        if name.startswith(part.own)
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
