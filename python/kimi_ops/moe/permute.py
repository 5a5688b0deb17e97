# SPDX-License-Identifier: MIT
"""Sorting token rows by expert, and the weighted way back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import _check
from kimi_ops.operators import permute as operators
from kimi_ops.routing import PermutePlan, as_float32, as_int32

__all__ = [
    "PermutePlan",
    "permute",
    "permute_plan",
    "permute_weights",
    "sort_chunks",
    "unpermute",
]


def permute_plan(
    indices: Tensor,
    num_experts: int,
    *,
    align: int = 1,
    capacity: int | None = None,
    num_out_tokens: int | None = None,
) -> PermutePlan:
    """Plan the copy of token rows into groups, one group an expert.

    Rows are ordered by (expert, token, slot), the order of a stable argsort of the flat ids. The
    group of expert e ends at row ``offsets[e]`` (inclusive-end offsets, as
    `torch.nn.functional.grouped_mm` takes them) and is padded to a multiple of `align` rows.

    Parameters
    ----------
    indices : Tensor [T, K] int32 or int64
        Expert of every (token, slot) pair; -1 or E (transformers' sentinel) is a dropped pair. Or a
        routing map [T, E] bool, as if expert e had slot e of every token: K is E then, rows are
        ordered by (expert, token), and weights beside the plan are [T, E].
    num_experts : int
        E, at most 1024.
    align : int
        Each group's number of rows is rounded up to a multiple of this.
    capacity : int, optional
        Each group has exactly this many rows, [E, capacity] in all: pairs beyond, the last of the
        order, are dropped (`drop_to_capacity` drops others), missing ones are padding. With
        ``align=1``.
    num_out_tokens : int, optional
        The number of rows, where it is known: rows behind it are dropped, missing ones are padding.
        Not beside `capacity`.

    Returns
    -------
    PermutePlan
        ``row_map`` [T, K] int32, the destination row, -1 for dropped pairs; ``source`` [cap] int32,
        t * K + k, -1 for padding; ``offsets`` [E] int32; ``tokens_per_expert`` [E] int32, without
        padding. ``cap = T * K + E * (align - 1)`` (or ``E * capacity``, or `num_out_tokens`) needs
        no value of `indices`: nothing is read back from the device.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or `align`; an id outside -1 .. E, which is looked at on the CPU (where
        the text names the first one) and with ``KIMI_OPS_CHECK=1`` elsewhere.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import permute_plan
    >>> plan = permute_plan(torch.tensor([[2, 0], [0, -1]], dtype=torch.int32), 3, align=2)
    >>> plan.row_map.tolist(), plan.offsets.tolist()
    ([[2, 0], [1, -1]], [2, 2, 4])
    >>> plan.source.tolist()
    [1, 2, 0, -1, -1, -1, -1]

    Notes
    -----
    The dense [T, K] map is the index-map form of TransformerEngine's and vLLM's MoE permutation.
    """
    op = "permute_plan"
    if getattr(indices, "dtype", None) == torch.bool:
        _check.shape(op, "indices", indices, ("T", num_experts), "a routing map has all experts")
        experts = torch.arange(num_experts, dtype=torch.int32, device=indices.device)
        indices = torch.where(indices, experts, -1)
    indices = as_int32(indices)
    plan = PermutePlan._make(operators.permute_plan(indices, num_experts, align))
    if capacity is not None:
        if align != 1 or num_out_tokens is not None:
            raise ValueError(
                f"{op}: capacity: expected align = 1 and no num_out_tokens beside it, got {align} "
                f"and {num_out_tokens}; groups have exactly so many rows"
            )
        _check.between(op, "capacity", capacity, 0, (2**31 - 1) // num_experts)
        return _padded(plan, indices, capacity)
    if num_out_tokens is None or num_out_tokens == len(plan.source):
        return plan
    _check.between(op, "num_out_tokens", num_out_tokens, 0, 2**31 - 1)
    source = F.pad(plan.source, (0, max(0, num_out_tokens - len(plan.source))), value=-1)
    return PermutePlan(
        torch.where(plan.row_map < num_out_tokens, plan.row_map, -1),
        source[:num_out_tokens].contiguous(),
        plan.offsets.clamp(max=num_out_tokens),
        plan.tokens_per_expert,
    )


def ranks(plan: PermutePlan, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Experts [T, K] int64 of a plan's pairs, 0 for dropped ones, and places in the groups."""
    expert = torch.where(plan.row_map < 0, 0, indices).long()
    starts = torch.cat([plan.offsets.new_zeros(1), plan.offsets[:-1]])
    return expert, plan.row_map - starts[expert]


def _padded(plan: PermutePlan, indices: Tensor, capacity: int) -> PermutePlan:
    """Groups of exactly `capacity` rows."""
    expert, rank = ranks(plan, indices)
    kept = (plan.row_map >= 0) & (rank < capacity)
    row_map = torch.where(kept, expert.int() * capacity + rank, -1)
    experts = len(plan.offsets)
    rows = experts * capacity
    source = plan.source.new_full((rows + 1,), -1)  # the last one takes what is dropped
    pairs = torch.arange(row_map.numel(), dtype=torch.int32, device=row_map.device)
    source.scatter_(0, torch.where(kept, row_map, rows).flatten().long(), pairs)
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=row_map.device) * capacity
    counts = plan.tokens_per_expert.clamp(max=capacity)
    return PermutePlan(row_map, source[:rows].contiguous(), ends, counts)


def permute(x: Tensor, plan: PermutePlan) -> Tensor:
    """Copy token rows to their experts' groups: ``y[r] = x[plan.source[r] // K]``.

    Parameters
    ----------
    x : Tensor [T, H], any dtype but float64
        Rows may be strided. Quantised payloads travel with their scales by a second call:
        ``permute(scales, plan)``; weights beside rows by `permute_weights`.
    plan : PermutePlan
        From `permute_plan` with the same T.

    Returns
    -------
    Tensor [cap, H], the dtype of x
        Padding rows are zero.

    Raises
    ------
    TypeError, ValueError
        x is not a matrix of T rows on the plan's device, or float64.

    Notes
    -----
    Differentiable in float32, bfloat16 and float16 x: ``dx[t]`` is the sum of its rows' gradients,
    added in slot order in fp32.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import permute, permute_plan
    >>> plan = permute_plan(torch.tensor([[1], [0]], dtype=torch.int32), 2)
    >>> permute(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), plan).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    """
    return operators.permute(x, plan.row_map, plan.source)


def permute_weights(weights: Tensor, plan: PermutePlan) -> Tensor:
    """Carry the weight of every pair to its row: ``w[r] = weights.flatten()[plan.source[r]]``.

    Parameters
    ----------
    weights : Tensor [T, K] float32, bfloat16 or float16
    plan : PermutePlan

    Returns
    -------
    Tensor [cap] float32
        0 for padding rows. Differentiable.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import permute_plan, permute_weights
    >>> plan = permute_plan(torch.tensor([[1, 0]], dtype=torch.int32), 2, align=2)
    >>> permute_weights(torch.tensor([[0.25, 0.5]]), plan).tolist()
    [0.5, 0.0, 0.25, 0.0]
    """
    op = "permute_weights"
    _check.tensor(op, "weights", weights)
    weights = as_float32(weights)
    _check.dtype(op, "weights", weights, (torch.float32,))
    pairs = tuple(plan.row_map.shape)
    _check.shape(op, "weights", weights, pairs, "pass one for each pair of the plan")
    _check.same_device(op, "weights", weights, "plan.row_map", plan.row_map)
    # A pair is a token with one slot.
    return operators.permute(weights.reshape(-1, 1), plan.row_map.reshape(-1, 1), plan.source).view(
        -1
    )


def unpermute(
    y: Tensor,
    plan: PermutePlan,
    weights: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Bring rows back to their tokens: ``x[t] = sum_k weights[t, k] * y[plan.row_map[t, k]]``.

    Parameters
    ----------
    y : Tensor [cap, H], float32, bfloat16 or float16
    plan : PermutePlan
    weights : Tensor [T, K] float32, bfloat16 or float16, optional
        1 where absent. Dropped pairs add nothing, whatever their weight.
    out_dtype : torch.dtype, optional
        float32: the sums as they are. From 16-bit rows that costs a copy of them in float32.

    Returns
    -------
    Tensor [T, H], the dtype of y, or `out_dtype`
        Summed in fp32 from slot 0 to slot K - 1, rounded once: the same bits every time.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device.

    Notes
    -----
    Differentiable in y and weights; both gradients come from one pass over the rows. Padding rows
    are never read, so an uninitialised tail does no harm. To apply the weights in a later op, leave
    them out here and take `permute_weights`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import permute, permute_plan, unpermute
    >>> plan = permute_plan(torch.tensor([[1, 0]], dtype=torch.int32), 2)
    >>> rows = permute(torch.tensor([[1.0, 2.0]]), plan)
    >>> unpermute(rows, plan, torch.tensor([[0.25, 0.5]])).tolist()
    [[0.75, 1.5]]
    """
    weights = None if weights is None else as_float32(weights)
    if out_dtype is not None and out_dtype != getattr(y, "dtype", None):
        if out_dtype != torch.float32:
            raise TypeError(
                f"unpermute: out_dtype: expected None, float32 or the dtype of y, got {out_dtype}; "
                "round the result"
            )
        y = y.float()
    return operators.unpermute(y, plan.row_map, plan.source, weights)


def sort_chunks(x: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    """Cut x into chunks of rows and lay them out in a new order.

    ``concat(split(x, split_sizes)[i] for i in order)``: after an all-to-all, the (rank, expert)
    chunks become (expert, rank) chunks. Rows of x past the last chunk become zero rows at the end.

    Parameters
    ----------
    x : Tensor [R, H], any dtype but float64
    split_sizes : Tensor [C] int32, C at most 65536
        Rows of each chunk, at most R together.
    order : Tensor [C] int32
        A permutation of 0 .. C - 1.

    Returns
    -------
    Tensor [R, H], the dtype of x

    Raises
    ------
    TypeError, ValueError
        Wrong dtype or shape; on the CPU also sizes that are negative or pass R, and an order that
        is no permutation.

    Notes
    -----
    Differentiable in floating-point x. TransformerEngine calls it `moe_sort_chunks_by_index`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import sort_chunks
    >>> sizes, order = torch.tensor([1, 2]).int(), torch.tensor([1, 0]).int()
    >>> sort_chunks(torch.tensor([[1.0], [2.0], [3.0]]), sizes, order).tolist()
    [[2.0], [3.0], [1.0]]
    """
    return operators.sort_chunks(x, split_sizes, order, False)
