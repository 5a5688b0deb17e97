# SPDX-License-Identifier: MIT
"""Between a model, or a layer of one, and the folder that it comes from or goes to."""

from pathlib import Path

import torch
import torch.distributed as dist

from kimi_ops.formats import FP8_BLOCK, INT4_WORD
from kimi_ops.models.kimi_k2.checkpoint import Part, load, save
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.models.kimi_k2.decoder import Decoder, DecoderLayer, allocate
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.layers import check_dtype
from kimi_ops.models.kimi_k2.moe import MoE
from kimi_ops.nn import StoredExperts
from kimi_ops.nn.stored import FORMS

__all__ = ["keep_quantized", "load_layer", "load_weights", "read_config", "save_weights", "whole"]


def read_config(
    folder: str | Path, dtype: torch.dtype | None, *, text_only: bool
) -> tuple[KimiK2Config, torch.dtype]:
    """The configuration in a folder; the dtype of the parameters, by it where None is given."""
    config = KimiK2Config.from_file(Path(folder) / "config.json", text_only=text_only)
    return config, dtype or getattr(torch, config.torch_dtype or "float32")


def whole(model: Decoder) -> Part:
    """All of a model, or of a stage."""
    return Part(model, model.config, model.expert_ranks, own=model.prefixes)


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
            moe.experts = StoredExperts(
                here, hidden, width, form=form, activation=config.hidden_act, device="meta"
            )
    part.module.eval()


def load_weights(
    model: Decoder, folder: str | Path, *, device: torch.device | str, text_only: bool = False
) -> None:
    """Allocate a model on the meta device and read its tensors from `folder`, converting dtypes.

    All names and shapes are compared before memory is allocated. What fails later, at a value that
    is not finite for example, leaves the model on the meta device.

    Raises
    ------
    ValueError
        A file that is missing, truncated or no safetensors; files that do not fit their index; a
        tensor that is missing, unknown, has another shape or values that are not finite.
    """
    load(whole(model), folder, lambda: model.allocate(device), text_only=text_only)


def load_layer(
    folder: str | Path,
    layer: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    experts: str | None = None,
    expert_ranks: ExpertRanks | None = None,
    text_only: bool = False,
) -> DecoderLayer:
    """One layer of a checkpoint: no other is read, and only the files that hold it are opened.

    Parameters
    ----------
    folder, device, dtype, experts, expert_ranks, text_only
        As of `KimiK2.from_pretrained`.
    layer : int
        From 0.

    Returns
    -------
    DecoderLayer
        ``layer(x, cos, sin)`` gives the hidden states [B, S, H] after the layer, for x [B, S, H]
        and the rotary tables of ``rotary_tables(config, positions [B, S])``. `recompute` and
        `fp8_activations` may be set, as of the model.

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
    config, dtype = read_config(folder, dtype, text_only=text_only)
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
    load(part, folder, lambda: allocate(module, device), text_only=text_only)
    return module


def save_weights(
    model: Decoder,
    folder: str | Path,
    *,
    max_shard_bytes: int,
    stages: dist.ProcessGroup | None = None,
) -> None:
    """Write ``config.json`` and the weights; see `KimiK2.save_pretrained`. `stages`: a rank of each
    stage, of which `model` is one."""
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
    save(whole(model), folder, weight.dtype, max_shard_bytes, stages)
