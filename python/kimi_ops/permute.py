# SPDX-License-Identifier: MIT
"""Sorting token rows by expert, and the weighted way back."""

import os

import torch
from torch import Tensor

from kimi_ops.reference import permute as reference
from kimi_ops.reference.permute import PermutePlan

__all__ = ["PermutePlan", "permute", "permute_plan", "sort_chunks", "unpermute"]

_MAX_ROWS = 2**31 - 1  # rows are int32; row * H is 64-bit arithmetic


def permute_plan(indices: Tensor, num_experts: int, *, align: int = 1) -> PermutePlan:
    """Plan the copy of token rows into groups, one group an expert.

    Rows are ordered by (expert, token, slot), the order of a stable argsort of the flat ids. The
    group of expert e ends at row ``offsets[e]`` (inclusive-end offsets, as
    `torch.nn.functional.grouped_mm` takes them) and is padded to a multiple of `align` rows.

    Parameters
    ----------
    indices : Tensor [T, K] int32
        Expert of every (token, slot) pair; -1 is a dropped pair.
    num_experts : int
        E.
    align : int
        Each group's number of rows is rounded up to a multiple of this.

    Returns
    -------
    PermutePlan
        ``row_map`` [T, K] int32, the destination row, -1 for dropped pairs; ``source`` [cap] int32,
        t * K + k, -1 for padding; ``offsets`` [E] int32; ``tokens_per_expert`` [E] int32, without
        padding. ``cap = T * K + E * (align - 1)`` needs no value of `indices`: nothing is read back
        from the device.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or `align`; an id outside -1 .. E - 1, which is looked at on the CPU and
        with ``KIMI_OPS_CHECK=1`` elsewhere.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.permute import permute_plan
    >>> plan = permute_plan(torch.tensor([[2, 0], [0, -1]], dtype=torch.int32), 3, align=2)
    >>> plan.row_map.tolist(), plan.offsets.tolist()
    ([[2, 0], [1, -1]], [2, 2, 4])
    >>> plan.source.tolist()
    [1, 2, 0, -1, -1, -1, -1]

    Notes
    -----
    The dense [T, K] map is the index-map form of TransformerEngine's and vLLM's MoE permutation.
    """
    if indices.dtype != torch.int32:
        raise TypeError(
            f"permute_plan: indices: expected int32, got {indices.dtype}; use indices.int()"
        )
    if indices.dim() != 2 or indices.shape[1] < 1:
        raise ValueError(
            "permute_plan: indices: expected shape [T, K] with K >= 1, got "
            f"{list(indices.shape)}; reshape to one row a token"
        )
    for name, value in (("num_experts", num_experts), ("align", align)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"permute_plan: {name}: expected an int, got {type(value).__name__}; pass a number"
            )
        if value < 1:
            raise ValueError(f"permute_plan: {name}: expected at least 1, got {value}; raise it")
    capacity = indices.numel() + num_experts * (align - 1)
    if capacity > _MAX_ROWS:
        raise ValueError(
            f"permute_plan: indices: expected at most {_MAX_ROWS} rows (row ids are int32), got "
            f"T*K + E*(align-1) = {capacity}; split the tokens"
        )
    check_ids("permute_plan", indices, num_experts)
    return reference.permute_plan(indices, num_experts, align)


def permute(x: Tensor, plan: PermutePlan) -> Tensor:
    """Copy token rows to their experts' groups: ``y[r] = x[plan.source[r] // K]``.

    Parameters
    ----------
    x : Tensor [T, H], floating point
    plan : PermutePlan
        From `permute_plan` with the same T.

    Returns
    -------
    Tensor [cap, H], the dtype of x
        Padding rows are zero.

    Raises
    ------
    TypeError, ValueError
        x is not a floating-point matrix of T rows on the plan's device.

    Notes
    -----
    Differentiable in x: ``dx[t]`` is the sum of its rows' gradients, added in slot order in fp32.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.permute import permute, permute_plan
    >>> plan = permute_plan(torch.tensor([[1], [0]], dtype=torch.int32), 2)
    >>> permute(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), plan).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    """
    _check_matrix("permute", "x", x, plan.row_map.shape[0], "T", plan.row_map.device)
    return reference.permute(x, plan)


def unpermute(y: Tensor, plan: PermutePlan, weights: Tensor | None = None) -> Tensor:
    """Bring rows back to their tokens: ``x[t] = sum_k weights[t, k] * y[plan.row_map[t, k]]``.

    Parameters
    ----------
    y : Tensor [cap, H], floating point
    plan : PermutePlan
    weights : Tensor [T, K] float32 (float64 beside float64 rows), optional
        1 where absent. Dropped pairs add nothing, whatever their weight.

    Returns
    -------
    Tensor [T, H], the dtype of y
        Summed in fp32 from slot 0 to slot K - 1, rounded once: the same bits every time.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device.

    Notes
    -----
    Differentiable in y and weights; both gradients come from one pass over the rows. Rows outside
    the groups are never read, so an uninitialised tail does no harm.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.permute import permute, permute_plan, unpermute
    >>> plan = permute_plan(torch.tensor([[1, 0]], dtype=torch.int32), 2)
    >>> rows = permute(torch.tensor([[1.0, 2.0]]), plan)
    >>> unpermute(rows, plan, torch.tensor([[0.25, 0.5]])).tolist()
    [[0.75, 1.5]]
    """
    _check_matrix("unpermute", "y", y, plan.source.shape[0], "cap", plan.row_map.device)
    if weights is not None:
        if weights.shape != plan.row_map.shape:
            raise ValueError(
                f"unpermute: weights: expected shape {list(plan.row_map.shape)}, got "
                f"{list(weights.shape)}; pass one weight for each pair of the plan"
            )
        expected = torch.float64 if y.dtype == torch.float64 else torch.float32
        if weights.dtype != expected:
            raise TypeError(
                f"unpermute: weights: expected {expected} beside {y.dtype} rows, got "
                f"{weights.dtype}; convert with .to({expected})"
            )
        if weights.device != y.device:
            raise ValueError(
                f"unpermute: weights: expected device {y.device}, got {weights.device}; move them"
            )
    return reference.unpermute(y, plan, weights)


def sort_chunks(x: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    """Cut x into chunks of rows and lay them out in a new order.

    ``concat(split(x, split_sizes)[i] for i in order)``: after an all-to-all, the (rank, expert)
    chunks become (expert, rank) chunks. Rows of x past the last chunk become zero rows at the end.

    Parameters
    ----------
    x : Tensor [R, H], floating point
    split_sizes : Tensor [C] int32
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
    Differentiable in x. The operation is `moe_sort_chunks_by_index` of TransformerEngine.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.permute import sort_chunks
    >>> sizes, order = torch.tensor([1, 2]).int(), torch.tensor([1, 0]).int()
    >>> sort_chunks(torch.tensor([[1.0], [2.0], [3.0]]), sizes, order).tolist()
    [[2.0], [3.0], [1.0]]
    """
    _check_matrix("sort_chunks", "x", x, x.shape[0] if x.dim() else 0, "R", x.device)
    for name, value in (("split_sizes", split_sizes), ("order", order)):
        if value.dtype != torch.int32:
            raise TypeError(
                f"sort_chunks: {name}: expected int32, got {value.dtype}; use {name}.int()"
            )
        if value.dim() != 1 or value.shape != split_sizes.shape or value.device != x.device:
            raise ValueError(
                f"sort_chunks: {name}: expected shape [{split_sizes.numel()}] on {x.device}, "
                f"got {list(value.shape)} on {value.device}; pass one entry for each chunk"
            )
    if x.device.type == "cpu":
        sizes = split_sizes.tolist()
        if any(size < 0 for size in sizes) or sum(sizes) > x.shape[0]:
            raise ValueError(
                f"sort_chunks: split_sizes: expected sizes >= 0 with a sum <= R = {x.shape[0]}, "
                f"got {sizes}; correct the sizes"
            )
        if sorted(order.tolist()) != list(range(len(sizes))):
            raise ValueError(
                f"sort_chunks: order: expected a permutation of 0 .. {len(sizes) - 1}, got "
                f"{order.tolist()}; name every chunk once"
            )
    return reference.sort_chunks(x, split_sizes, order)


def check_ids(op: str, indices: Tensor, num_experts: int) -> None:
    """Refuse ids out of range, where reading them costs no synchronisation or was asked for."""
    kind = indices.device.type
    readable = kind == "cpu" or (kind != "meta" and os.environ.get("KIMI_OPS_CHECK") == "1")
    if not readable or indices.numel() == 0:
        return
    low, high = (int(value) for value in indices.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"{op}: indices: expected ids in -1 .. {num_experts - 1}, got {low} .. {high}; mark "
            "dropped pairs with -1"
        )


def _check_matrix(
    op: str, name: str, x: Tensor, rows: int, letter: str, device: torch.device
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name}: expected a floating dtype, got {x.dtype}; convert it")
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(
            f"{op}: {name}: expected shape [{letter}={rows}, H], got {list(x.shape)}; use the "
            "plan made for these rows"
        )
    if x.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {x.device}; move it there")
