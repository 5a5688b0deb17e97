# SPDX-License-Identifier: MIT
"""The projections of an attention layer that QK-Clip scales, and what it cannot scale them for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kimi_ops.optim.qk_clip import Share, check_rows, shares
from kimi_ops.reference.qk_clip import Layer, Rows

_MLA = ("kv_b_proj", "max_logits", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MHA = ("q_proj", "k_proj", "max_logits", "num_heads", "num_kv_heads", "head_dim")
# Queries, keys and values in one weight, whose rows each framework orders in its own way.
_FUSED = (
    "in_proj_weight", "qkv_proj", "linear_qkv", "qkv", "to_qkv", "wqkv", "Wqkv", "c_attn",
    "query_key_value", "W_pack", "kv_proj", "linear_kv",
)  # fmt: skip
# Between a projection and the logits: what these return does not shrink with their input.
_NORMS = (
    "q_norm", "k_norm", "qk_norm", "norm_q", "norm_k", "q_layernorm", "k_layernorm",
    "qk_layernorm", "query_norm", "key_norm", "query_layernorm", "key_layernorm", "q_ln", "k_ln",
    "ln_q", "ln_k", "use_qk_norm",
)  # fmt: skip


class Part(NamedTuple):
    """A weight, bias or copy of a layer, as far as this rank holds it."""

    weight: Tensor
    rows: Rows
    power: float
    mesh: Any  # the DeviceMesh whose ranks hold its other rows, or None
    parameter: Tensor  # that it is, or is a part or copy of

    def copies(self, rows: Iterable[tuple[Tensor, int]]) -> Iterator[Part]:
        """Copies of some rows of it, each with the number of the first one."""
        for copy, first in rows:
            place = self.rows._replace(first_row=self.rows.first_row + first)
            yield self._replace(weight=copy, rows=place)


def of_layer(op: str, layer: Any, number: int, alpha: float, gqa_mode: str) -> tuple[Layer, Any]:
    """The layer of the op `clip_rows_`, and (projection's parameter, its share) of each."""
    mla = hasattr(layer, "kv_b_proj") or not hasattr(layer, "k_proj")
    _require(op, layer, mla)
    maxima, _ = local(op, "max_logits", layer.max_logits)
    wide = isinstance(maxima, Tensor) and maxima.dtype in (torch.float32, torch.float64)
    if not wide or maxima.ndim != 1 or not len(maxima):
        got = f"{list(maxima.shape)} in {maxima.dtype}" if isinstance(maxima, Tensor) else maxima
        raise TypeError(
            f"{op}: layers[{number}].max_logits: expected [heads] in fp32 or fp64, got {got}; "
            "register such a buffer"
        )
    heads = len(maxima)
    if not mla and layer.num_heads != heads:
        raise ValueError(
            f"{op}: layers[{number}].max_logits: expected {layer.num_heads} heads, got {heads}; "
            "give the heads that this rank computes in both places"
        )
    query = "q_proj" if hasattr(layer, "q_proj") else "q_b_proj"
    key = "kv_b_proj" if mla else "k_proj"
    names = _MLA[2:] if mla else _MHA[4:]
    layout = "mla" if mla else "mha" if layer.num_kv_heads == heads else "gqa"
    sizes = {name: getattr(layer, name) for name in names}
    told, *of = shares(op, heads, layout, alpha, gqa_mode, **sizes)
    found = [
        (f"layers[{number}].{projection}.{name}", parameter, share)
        for projection, share in zip((query, key), of, strict=True)
        for name, parameter in _parameters(op, f"layers[{number}].{projection}", layer)
    ]
    return told, found


def part(op: str, name: str, weight: Tensor, layer: int, share: Share) -> Part:
    """What this rank holds of a projection's weight, bias or copy."""
    own, first = local(op, name, weight)
    # All rows: of the projection, or of the heads that this rank has (tensor parallel).
    whole = own.shape[:1] == (share.blocks * share.block_rows,)
    check_rows(op, name, own if whole else weight, share)
    rows = Rows(
        layer, share.blocks, share.block_rows, 0 if whole else first, share.shared, share.whole
    )
    # Heads of this rank's own are nobody else's; copies and rows of the same ones share maxima.
    apart = whole and own.shape != weight.shape
    mesh = None if apart else getattr(weight, "device_mesh", None)
    return Part(own, rows, share.power, mesh, weight)


def local(op: str, name: str, tensor: Any) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and the first row of it."""
    # Where nobody has imported it there is none, and the import takes long.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor, 0
    mesh, first = tensor.device_mesh, 0
    sharded = [i for i, how in enumerate(tensor.placements) if not how.is_replicate()]
    # A strided shard is of another type, and counts as another.
    if len(sharded) > 1 or any(tensor.placements[i] != module.Shard(0) for i in sharded):
        raise ValueError(
            f"{op}: {name}: expected a DTensor that is replicated, or sharded along dimension 0 by "
            f"one mesh dimension, got {tensor.placements}; redistribute it"
        )
    for i in sharded:  # chunks as of torch.chunk
        rows = tensor.shape[0]
        first = min(rows, -(-rows // mesh.size(i)) * mesh.get_local_rank(i))
    return tensor.detach().to_local(), first


def _require(op: str, layer: Any, mla: bool) -> None:
    wanted: tuple[str, ...] = _MHA
    if mla:
        wanted = ("q_proj" if hasattr(layer, "q_proj") else "q_b_proj", *_MLA)
    missing = [name for name in wanted if not hasattr(layer, name)]
    if not missing:
        return
    kind = type(layer).__name__
    fused = [name for name in _FUSED if hasattr(layer, name)]
    if fused:
        raise TypeError(
            f"{op}: layers: expected a projection each for queries and keys, got a {kind} with "
            f"{fused[0]}, whose rows may lie in any order; split it into q_proj and k_proj"
        )
    raise TypeError(
        f"{op}: layers: expected attention modules, got a {kind} without {missing[0]}; "
        "give model.attention_layers()"
    )


def refuse_norms(op: str, layer: Any, number: int) -> None:
    """A layer whose queries or keys are normalised between projection and logits."""
    for name in _NORMS:
        norm = getattr(layer, name, None)
        if norm is None or norm is False or isinstance(norm, nn.Identity):
            continue
        if name == "q_norm" and hasattr(layer, "q_b_proj"):
            # Before the projection, of the compressed query, if its size says so.
            size = tuple(getattr(getattr(norm, "weight", None), "shape", ()))
            head = layer.qk_nope_head_dim + layer.qk_rope_head_dim
            if size == (getattr(layer.q_b_proj, "in_features", None),) != (head,):
                continue
        raise ValueError(
            f"{op}: layers[{number}]: expected logits that shrink with q and k, got a "
            f"{type(layer).__name__} with {name}: normalised heads keep their size whatever the "
            "projections do; leave the layer out, the norm bounds its logits"
        )


def _parameters(op: str, path: str, layer: Any) -> list[tuple[str, Tensor]]:
    """The weight of a projection, and its bias if it has one."""
    module = getattr(layer, path.rpartition(".")[2])
    given = getattr(module, "weight", None)
    others = [name for name, _ in module.named_parameters() if name not in ("weight", "bias")]
    if not isinstance(given, Tensor) or others:
        raise TypeError(
            f"{op}: {path}: expected y = W x + b with a weight and perhaps a bias, got a "
            f"{type(module).__name__} with {', '.join(others) or 'no weight'}; merge what it adds "
            "into the weight"
        )
    bias = getattr(module, "bias", None)
    return [("weight", given)] + ([] if bias is None else [("bias", bias)])
