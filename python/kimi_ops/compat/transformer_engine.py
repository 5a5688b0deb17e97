# SPDX-License-Identifier: MIT
"""TransformerEngine's permutation and router, the signatures of 2.20 (`transformer_engine.pytorch`,
`transformer_engine.pytorch.router`).

Tensors on the CPU are served, too. Sums are fp32 in a fixed order, on any device the same bits.
Quantized tensors of TransformerEngine (FP8, MXFP8) are refused.
"""

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.compat import _maps
from kimi_ops.compat._router_maps import (
    RoutingMapFormat,
    fused_compute_score_for_moe_aux_loss,
    fused_moe_aux_loss,
    fused_topk_with_score_function,
)
from kimi_ops.moe.permute import permute, sort_chunks
from kimi_ops.routing import PermutePlan, as_int32

__all__ = [
    "RoutingMapFormat",
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_topk_with_score_function",
    "moe_permute",
    "moe_permute_and_pad_with_probs",
    "moe_permute_with_probs",
    "moe_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs",
    "moe_unpermute",
]


def moe_permute(
    inp: Tensor,
    routing_map: Tensor,
    num_out_tokens: int,
    max_token_num: int = -1,
    map_type: str = "mask",
) -> tuple[Tensor, Tensor]:
    """Copy token rows to their experts' groups: rows in the order (expert, token).

    Parameters
    ----------
    inp : Tensor [T, H], any dtype but float64
    routing_map : Tensor
        "mask": [T, E] bool or integers, not 0 where a token goes to an expert. "index": [T, K] or
        [T], experts 0 .. 1023, -1 (or 1024) a dropped pair.
    num_out_tokens : int
        Rows of the result; rows behind it are dropped, missing ones are zero. With "index" 0 means
        T * K.
    max_token_num : int
        A workspace's size elsewhere. There is no workspace.
    map_type : {"mask", "index"}

    Returns
    -------
    Tensor [R, H]
        Differentiable.
    Tensor, the map for `moe_unpermute`
        "mask": [T, 2 E + 1] int32 in TransformerEngine's form: rows of a token from its last expert
        to its first, from column E on those experts, last their number; -1 between. "index":
        [K * T] int32, slot by slot.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import moe_permute, moe_unpermute
    >>> x, mask = torch.tensor([[1.0], [2.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> rows, row_id_map = moe_permute(x, mask, 3)
    >>> rows.flatten().tolist(), row_id_map.tolist()
    ([1.0, 2.0, 1.0], [[2, 0, 1, 0, 2], [1, -1, 0, -1, 1]])
    >>> moe_unpermute(rows, row_id_map, restore_shape=x.shape).flatten().tolist()
    [2.0, 2.0]
    """
    op = "moe_permute"
    _check.choice(op, "map_type", map_type, ("mask", "index"))
    if map_type == "index":
        _check.between(op, "num_out_tokens", num_out_tokens, 0, 2**31 - 1)
        plan = _maps.by_index(op, "routing_map", routing_map, len(inp), num_out_tokens or None)
        return permute(inp, plan), plan.row_map.t().reshape(-1)
    plan = _masked(op, inp, routing_map, num_out_tokens)
    return permute(inp, plan), _encode(plan.row_map)


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_permute` by a mask, with the probability of each row beside it.

    A row whose probability is 0 is zero (padding of the mask) and sends no gradient back.

    Parameters
    ----------
    inp : Tensor [T, H]
    probs : Tensor [T, E], any dtype but float64
    routing_map : Tensor [T, E]
    num_out_tokens : int

    Returns
    -------
    Tensor [R, H], Tensor [R] the dtype of probs, Tensor [T, 2 E + 1] int32
        Rows, their probabilities, the map. Differentiable in inp and probs.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import moe_permute_with_probs
    >>> x, probs = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    >>> rows, row_probs, _ = moe_permute_with_probs(x, probs, probs > 0, 3)
    >>> rows.flatten().tolist(), row_probs.tolist()
    ([1.0, 2.0, 1.0], [0.25, 1.0, 0.75])
    """
    plan = _masked("moe_permute_with_probs", inp, routing_map, num_out_tokens)
    rows, row_probs = _with_probs("moe_permute_with_probs", inp, probs, plan)
    return rows, row_probs, _encode(plan.row_map)


def moe_permute_and_pad_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, tokens_per_expert: Tensor, align_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """`moe_permute_with_probs` with each expert's rows padded to a multiple by zero rows.

    Reads the padded total on the host: it is the size of the result.

    Parameters
    ----------
    inp : Tensor [T, H]
    probs : Tensor [T, E]
    routing_map : Tensor [T, E]
    tokens_per_expert : Tensor [E]
        Sums of the mask's columns.
    align_size : int

    Returns
    -------
    Tensor [R, H], Tensor [R], Tensor [T, 2 E + 1] int32
        Rows, probabilities and the map, which knows nothing of the padding.
    Tensor [E] or None
        Rows of padding in front of each expert, for `moe_unpermute`; None where there is none.
    Tensor [E] int64
        Padded rows of each expert.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import moe_permute_and_pad_with_probs
    >>> x, probs = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    >>> rows, _, _, pad_offsets, padded = moe_permute_and_pad_with_probs(
    ...     x, probs, probs > 0, torch.tensor([2, 1]), 2)
    >>> rows.flatten().tolist(), pad_offsets, padded.tolist()
    ([1.0, 2.0, 1.0, 0.0], tensor([0, 0]), [2, 2])
    """
    op = "moe_permute_and_pad_with_probs"
    _check.between(op, "align_size", align_size, 1, 2**20)
    _check.tensor(op, "tokens_per_expert", tokens_per_expert)
    counts = tokens_per_expert.to(inp.device, torch.int64)
    padded = (counts + align_size - 1).div(align_size, rounding_mode="floor") * align_size
    plain = _maps.by_mask(op, routing_map, len(inp), None)
    plan = _maps.by_mask(op, routing_map, len(inp), int(padded.sum()), align_size)
    rows, row_probs = _with_probs(op, inp, probs, plan)
    before = (padded - counts).cumsum(0) - (padded - counts)
    pad_offsets = None if torch.equal(padded, counts) else before
    return rows, row_probs, _encode(plain.row_map), pad_offsets, padded


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """Bring rows back to their tokens and add them, weighted where `merging_probs` is given.

    Parameters
    ----------
    inp : Tensor [R, H], float32, bfloat16 or float16
    row_id_map : Tensor
        The map that the permutation gave.
    merging_probs : Tensor, optional
        [T, E] with a mask's map, [T, K] with an index map. Without it an index map brings each
        pair back as a token of its own.
    restore_shape : torch.Size, optional
        [T, H]; the map knows it.
    map_type : {"mask", "index"}
    probs : Tensor, optional
        The old name of `merging_probs`.
    pad_offsets : Tensor [E], optional
        From `moe_permute_and_pad_with_probs`; with a mask's map.

    Returns
    -------
    Tensor [T, H], the dtype of inp
        Summed in fp32 and rounded once. Differentiable in inp and merging_probs.
    """
    op = "moe_unpermute"
    _check.choice(op, "map_type", map_type, ("mask", "index"))
    _check.tensor(op, "row_id_map", row_id_map)
    if probs is not None and merging_probs is not None:
        raise ValueError(f"{op}: probs: expected one of probs and merging_probs, got both")
    merging_probs = probs if merging_probs is None else merging_probs
    if map_type == "mask":
        _check.shape(op, "row_id_map", row_id_map, ("T", "2 E + 1"), "that of moe_permute")
        row_map, experts = _decode(row_id_map)
        if pad_offsets is not None:
            shift = pad_offsets.to(row_map)[experts.long()]
            row_map = torch.where(row_map < 0, row_map, row_map + shift)
        if merging_probs is not None:
            _check.shape(
                op, "merging_probs", merging_probs, (len(row_map), row_id_map.shape[1] // 2)
            )
            merging_probs = merging_probs.gather(1, experts.long())
    else:
        if pad_offsets is not None:
            raise ValueError(
                f"{op}: pad_offsets: expected map_type='mask', got 'index'; leave it out"
            )
        slots = 1
        if merging_probs is not None:
            _check.shape(op, "merging_probs", merging_probs, ("T", "K"))
            slots = merging_probs.shape[1]
        row_map = row_id_map.view(slots, -1).t()
    if restore_shape is not None and tuple(restore_shape) != (len(row_map), inp.shape[1]):
        raise ValueError(
            f"{op}: restore_shape: expected {[len(row_map), inp.shape[1]]}, the map's tokens and "
            f"the rows' columns, got {list(restore_shape)}; pass the shape before the permutation"
        )
    return _maps.rows_to_tokens(inp, row_map, merging_probs)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """Cut rows into chunks and lay them out in a new order: `kimi_ops.sort_chunks`.

    Parameters
    ----------
    inp : Tensor [R, H], any dtype but float64
    split_sizes : Tensor [C], integers
    sorted_index : Tensor [C], integers
        A permutation of the chunks.

    Returns
    -------
    Tensor [R, H]
        Differentiable.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import moe_sort_chunks_by_index
    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> moe_sort_chunks_by_index(x, torch.tensor([1, 2]), torch.tensor([1, 0])).flatten().tolist()
    [2.0, 3.0, 1.0]
    """
    return sort_chunks(inp, _int32(split_sizes, inp), _int32(sorted_index, inp))


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """`moe_sort_chunks_by_index` of rows and of their probabilities [R].

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.transformer_engine import moe_sort_chunks_by_index_with_probs
    >>> x, probs = torch.tensor([[1.0], [2.0]]), torch.tensor([0.25, 0.5])
    >>> one = torch.tensor([1, 1])
    >>> moe_sort_chunks_by_index_with_probs(x, probs, one, torch.tensor([1, 0]))[1].tolist()
    [0.5, 0.25]
    """
    _check.shape("moe_sort_chunks_by_index_with_probs", "probs", probs, (len(inp),))
    rows = moe_sort_chunks_by_index(inp, split_sizes, sorted_index)
    return rows, moe_sort_chunks_by_index(probs.unsqueeze(1), split_sizes, sorted_index).squeeze(1)


def _int32(value: Tensor, like: Tensor) -> Tensor:
    return as_int32(value).to(like.device, torch.int32)


def _masked(op: str, inp: Tensor, routing_map: Tensor, rows: int) -> PermutePlan:
    _check.tensor(op, "inp", inp)
    if type(inp) is not Tensor and hasattr(inp, "_fp8_dtype"):
        raise TypeError(
            f"{op}: inp: expected a plain tensor, got {type(inp).__name__}, which is not served; "
            "permute its data and its scales in a call each"
        )
    _check.between(op, "num_out_tokens", rows, 0, 2**31 - 1)
    return _maps.by_mask(op, routing_map, len(inp), rows)


def _with_probs(op: str, inp: Tensor, probs: Tensor, plan: PermutePlan) -> tuple[Tensor, Tensor]:
    """Rows and probabilities; pairs of probability 0 are padding to the rows alone."""
    _check.tensor(op, "probs", probs)
    _check.shape(op, "probs", probs, tuple(plan.row_map.shape), "one for each token and expert")
    row_probs = _maps.pairs_to_rows(probs, plan)
    kept = plan._replace(
        row_map=torch.where(probs == 0, -1, plan.row_map),
        source=torch.where(row_probs == 0, -1, plan.source),
    )
    return permute(inp, kept), row_probs


def _encode(row_map: Tensor) -> Tensor:
    """[T, E] rows by expert -> [T, 2 E + 1]: by slot, from the last expert to the first."""
    tokens, experts = row_map.shape
    routed = row_map >= 0
    rank = routed.cumsum(1, dtype=torch.int32)
    count = rank[:, -1:]
    slot = torch.where(routed, count - rank, experts).long()  # the others share a spare column
    spare = row_map.new_full((tokens, experts + 1), -1)
    ids = torch.arange(experts, dtype=torch.int32, device=row_map.device).expand(tokens, experts)
    rows, of = spare.scatter(1, slot, row_map), spare.scatter(1, slot, ids)
    return torch.cat([rows[:, :experts], of[:, :experts], count], dim=1)


def _decode(row_id_map: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, K] by slot, -1 beyond a token's number, and the experts of the slots (0 there).

    K is the most that a token has, where looking costs nothing, otherwise E.
    """
    experts = row_id_map.shape[1] // 2
    count, slots = row_id_map[:, -1:], experts
    if row_id_map.device.type == "cpu" and len(count) and not torch.compiler.is_compiling():
        slots = max(1, int(count.max()))
    inside = torch.arange(slots, device=count.device) < count
    rows, of = row_id_map[:, :slots], row_id_map[:, experts : experts + slots]
    return torch.where(inside, rows, -1), torch.where(inside, of, 0)
