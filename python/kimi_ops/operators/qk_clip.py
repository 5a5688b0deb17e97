# SPDX-License-Identifier: MIT
"""The operators behind `kimi_ops.qk_clip_` on CPU tensors: native calls and fake tensors."""

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.operators.registry import register


def _max_logits_implementation(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    op = "attention_max_logits"
    _check.dtype(op, "q", q, tuple(_native.DTYPES))
    _check.dtype(op, "k", k, (q.dtype,))
    _check.shape(op, "q", q, ("B", "heads", "Sq", "D"))
    _check.shape(op, "k", k, (q.shape[0], "kv_heads", "Sk", q.shape[3]))
    batch, heads, queries, dim = q.shape
    dtype = _native.DTYPES[q.dtype]
    largest = _max_logits_output(q, k, scale, causal)
    _native.share_threads()
    size = _native.workspace_bytes(op, q, batch, heads, queries, dim, dtype)
    workspace = torch.empty((size,), dtype=torch.uint8)
    _native.call(
        op, q, q.data_ptr(), k.data_ptr(), largest.data_ptr(), workspace.data_ptr(), batch, heads,
        k.shape[1], queries, k.shape[2], dim, *q.stride(), *k.stride(), scale, causal, dtype,
    )  # fmt: skip
    return largest


def _max_logits_output(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty((q.shape[1],), dtype=torch.float32)


attention_max_logits = register(
    "attention_max_logits(Tensor q, Tensor k, float scale, bool causal) -> Tensor",
    _max_logits_implementation,
    _max_logits_output,
)


def _scale_rows_implementation(weight: Tensor, factors: Tensor, first: int, last: int) -> None:
    op = "scale_rows"
    _check.dtype(op, "weight", weight, tuple(_native.DTYPES))
    _check.shape(op, "weight", weight, ("rows", "in"))
    _check.dtype(op, "factors", factors, (torch.float32,))
    _check.shape(op, "factors", factors, ("heads",))
    heads = factors.shape[0]
    if heads == 0 or weight.shape[0] % heads:
        raise ValueError(
            f"{op}: weight: expected rows for {heads} heads, got {weight.shape[0]}; check factors"
        )
    rows = weight if weight.shape[1] <= 1 or weight.stride(1) == 1 else weight.contiguous()
    factors = factors.contiguous()
    _native.call(
        op, rows, rows.data_ptr(), factors.data_ptr(), heads, rows.shape[0] // heads, first, last,
        rows.shape[1], rows.stride(0), _native.DTYPES[rows.dtype],
    )  # fmt: skip
    if rows is weight:
        torch.autograd.graph.increment_version(weight)
    else:
        weight.copy_(rows)


def _nothing(weight: Tensor, factors: Tensor, first: int, last: int) -> None:
    return None


scale_rows_ = register(
    "scale_rows_(Tensor(a!) weight, Tensor factors, int first, int last) -> ()",
    _scale_rows_implementation,
    _nothing,
)
