# SPDX-License-Identifier: MIT
"""Megatron-LM's router and permutation, the signatures of megatron-core 0.19
(`megatron.core.transformer.moe.moe_utils`).

``fused`` chooses between two forms of the same result: the map of rows is Megatron's own ([R] token
of each row) or, with ``fused=True``, that of `kimi_ops.compat.transformer_engine`. Sums are fp32 in
a fixed order and rounded once; nothing is read on the host but where it is said.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import ScoreFunction
from kimi_ops.compat import _maps, _router
from kimi_ops.compat import transformer_engine as fused_ops
from kimi_ops.compat._arguments import only
from kimi_ops.moe.dense import spread
from kimi_ops.moe.permute import permute as permute_rows

__all__ = ["permute", "sort_chunks_by_idxs", "topk_routing_with_score_function", "unpermute"]
_ORDER = "sums are in a fixed order without it"


def topk_routing_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: ScoreFunction = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,
    router_replay: Any = None,
    dense_output: bool = False,
    precomputed_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them, in dense [T, E] or in [T, topk] form.

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
    topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias
        As in `kimi_ops.compat.transformer_engine.fused_topk_with_score_function`.
    fused : bool
        No difference.
    router_replay
        Not served: pass the ids as `precomputed_indices`.
    dense_output : bool
    precomputed_indices : Tensor [T, topk] integers, optional
        The experts, chosen elsewhere; weighed in their order.

    Returns
    -------
    Tensor [T, E] or [T, topk], the dtype of logits
        Weights. Differentiable in logits.
    Tensor [T, E] bool, or [T, topk] int64
        The map, or the ids, best first.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.megatron import topk_routing_with_score_function
    >>> logits = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    >>> probs, ids = topk_routing_with_score_function(logits, 2, dense_output=True)
    >>> probs.tolist(), ids.tolist()
    ([[0.5, 0.5]], [[1, 2]])
    """
    op = "topk_routing_with_score_function"
    only(op, "router_replay", router_replay, None, "pass recorded ids as precomputed_indices")
    _check.tensor(op, "logits", logits)
    _check.shape(op, "logits", logits, ("T", "E"))
    given = precomputed_indices
    if given is not None:
        _check.tensor(op, "precomputed_indices", given)
        _check.shape(op, "precomputed_indices", given, (len(logits), topk))
        given = given.long()
    weights, ids = _router.route(
        op, logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function,
        expert_bias, given,
    )  # fmt: skip
    if dense_output:
        return weights.to(logits.dtype), ids
    return spread(weights, ids, logits)


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    tokens_per_expert: Tensor | None = None,
    align_size: int = 0,
    return_batch_invariant_inverse_map: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Copy token rows to their experts' groups: rows in the order (expert, token).

    Parameters
    ----------
    tokens : Tensor [T, H], any dtype but float64
    routing_map : Tensor [T, E] bool or integers
    probs : Tensor [T, E], optional
    num_out_tokens : int
        Rows of the result: those behind it are dropped, missing ones are zero.
    fused : bool
        The map that is returned. With `probs`, TransformerEngine's rule that a row of probability 0
        is zero.
    drop_and_pad : bool
        Every column of the map has ``num_out_tokens // E`` tokens (looked at on the CPU only).
    tokens_per_expert : Tensor [E], optional
        Handed back; with `align_size` its padded form is.
    align_size : int
        Pads each expert's rows to a multiple; ``fused=True`` with `probs` and `tokens_per_expert`.
        Reads the padded total on the host.
    return_batch_invariant_inverse_map : bool
        Not served.

    Returns
    -------
    Tensor [R, H], Tensor [R] or None
        Rows and their probabilities. Differentiable in tokens and probs.
    Tensor
        [R] int64, the token of each row, -1 for a missing one; or TransformerEngine's map.
    Tensor or None, Tensor or None
        Offsets of the padding and `tokens_per_expert`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.megatron import permute, unpermute
    >>> x, mask = torch.tensor([[1.0], [2.0]]), torch.tensor([[True, True], [True, False]])
    >>> rows, _, tokens, _, _ = permute(x, mask, num_out_tokens=3)
    >>> rows.flatten().tolist(), tokens.tolist()
    ([1.0, 2.0, 1.0], [0, 1, 0])
    >>> unpermute(rows, tokens, x.shape, routing_map=mask).flatten().tolist()
    [2.0, 2.0]
    """
    op = "permute"
    inverse = return_batch_invariant_inverse_map
    only(op, "return_batch_invariant_inverse_map", inverse, False, _ORDER)
    if align_size:
        if not fused or probs is None or tokens_per_expert is None:
            raise ValueError(
                f"{op}: align_size: expected fused=True, probs and tokens_per_expert beside it, "
                f"got {align_size} without; pass them, or 0"
            )
        return fused_ops.moe_permute_and_pad_with_probs(
            tokens, probs, routing_map, tokens_per_expert, align_size
        )
    rows = _rows(op, routing_map, num_out_tokens, drop_and_pad)
    if fused:
        row_probs = None
        if probs is None:
            y, row_id_map = fused_ops.moe_permute(tokens, routing_map, rows)
        else:
            y, row_probs, row_id_map = fused_ops.moe_permute_with_probs(
                tokens, probs, routing_map, rows
            )
        return y, row_probs, row_id_map, None, tokens_per_expert
    plan = _maps.by_mask(op, routing_map, len(tokens), rows)
    row_probs = None if probs is None else _maps.pairs_to_rows(probs, plan)
    of = plan.source.div(routing_map.shape[1], rounding_mode="floor").long()  # -1 stays
    return permute_rows(tokens, plan), row_probs, of, None, tokens_per_expert


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    pad_offsets: Tensor | None = None,
    batch_invariant_inverse_map: Tensor | None = None,
) -> Tensor:
    """Bring rows back to their tokens and add them, weighted where `probs` is given.

    Parameters
    ----------
    permuted_tokens : Tensor [R, H], float32, bfloat16 or float16
    sorted_indices : Tensor
        The map that `permute` gave.
    restore_shape : torch.Size
        [T, H].
    probs : Tensor [T, E], optional
    routing_map : Tensor [T, E]
        That of `permute`; needed beside `probs`. Without it the largest number of rows of a token
        is read on the host (``fused=False``).
    fused, drop_and_pad : bool
        As in `permute`.
    pad_offsets : Tensor, optional
        With ``fused=True``.
    batch_invariant_inverse_map
        Not served.

    Returns
    -------
    Tensor [T, H], the dtype of permuted_tokens
        Differentiable in permuted_tokens and probs.
    """
    op = "unpermute"
    only(op, "batch_invariant_inverse_map", batch_invariant_inverse_map, None, _ORDER)
    if fused:
        return fused_ops.moe_unpermute(
            permuted_tokens, sorted_indices, merging_probs=probs, restore_shape=restore_shape,
            pad_offsets=pad_offsets,
        )  # fmt: skip
    only(op, "pad_offsets", pad_offsets, None, "padded rows go with fused=True")
    count, rows = restore_shape[0], len(permuted_tokens)
    _check.shape(op, "sorted_indices", sorted_indices, (rows,), "that of permute")
    if routing_map is None:
        if probs is not None:
            raise ValueError(f"{op}: routing_map: expected one beside probs, got none; pass it")
        return _maps.rows_to_tokens(permuted_tokens, _rows_of(sorted_indices, count), None)
    if drop_and_pad:
        _rows(op, routing_map, rows, drop_and_pad)
    plan = _maps.by_mask(op, routing_map, count, rows)
    return _maps.rows_to_tokens(permuted_tokens, plan.row_map, probs)


def sort_chunks_by_idxs(
    input: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cut rows, and `probs` [R] beside them, into chunks and lay them out in a new order.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.megatron import sort_chunks_by_idxs
    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> rows, _ = sort_chunks_by_idxs(x, torch.tensor([1, 2]), torch.tensor([1, 0]))
    >>> rows.flatten().tolist()
    [2.0, 3.0, 1.0]
    """
    if probs is None:
        return fused_ops.moe_sort_chunks_by_index(input, split_sizes, sorted_idxs), None
    return fused_ops.moe_sort_chunks_by_index_with_probs(input, probs, split_sizes, sorted_idxs)


def _rows(op: str, routing_map: Tensor, rows: int | None, drop_and_pad: bool) -> int:
    if rows is None:
        raise ValueError(
            f"{op}: num_out_tokens: expected the number of rows, got None; pass T * topk, or "
            "int(routing_map.sum())"
        )
    if not drop_and_pad:
        return rows
    experts = routing_map.shape[1]
    capacity = rows // experts
    looked_at = routing_map.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and bool(((routing_map != 0).sum(0) != capacity).any()):
        raise ValueError(
            f"{op}: drop_and_pad: expected {capacity} tokens in every column of the map, got "
            "others; pad the map to its capacity, or pass False"
        )
    return capacity * experts


def _rows_of(tokens: Tensor, count: int) -> Tensor:
    """Rows [T, K] of each token from the token of each row, in the order of the rows."""
    order = tokens.argsort(stable=True)
    of = tokens[order]
    starts = torch.searchsorted(of, torch.arange(count + 1, device=tokens.device))
    slots = max(1, int(starts.diff().max())) if count else 1
    row = starts[:-1, None] + torch.arange(slots, device=tokens.device)
    row = torch.where(row < starts[1:, None], row, len(order))
    return F.pad(order, (0, 1), value=-1)[row]
