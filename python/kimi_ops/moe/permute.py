# SPDX-License-Identifier: MIT
"""Sorting token rows by expert, and the weighted way back."""

import os

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.moe.plan import PermutePlan
from kimi_ops.operators import permute as _ops

__all__ = [
    "PermutePlan",
    "permute",
    "permute_plan",
    "permute_weights",
    "sort_chunks",
    "unpermute",
]

MAX_EXPERTS = 1024
MAX_CHUNKS = 65536
MAX_ROWS = 2**31 - 1  # rows are int32; row * H is 64-bit arithmetic


def permute_plan(indices: Tensor, num_experts: int, *, align: int = 1) -> PermutePlan:
    """Plan the copy of token rows into groups, one group an expert.

    Rows are ordered by (expert, token, slot), the order of a stable argsort of the flat ids. The
    group of expert e ends at row ``offsets[e]`` (inclusive-end offsets, as
    `torch.nn.functional.grouped_mm` takes them) and is padded to a multiple of `align` rows.

    Parameters
    ----------
    indices : Tensor [T, K] int32
        Expert of every (token, slot) pair; -1 or E (transformers' sentinel) is a dropped pair.
    num_experts : int
        E, at most 1024.
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
    _check.tensor(op, "indices", indices)
    _check.dtype(op, "indices", indices, (torch.int32,))
    _check.shape(op, "indices", indices, ("T", "K"), "reshape to one row a token")
    _check.between(op, "indices.shape[1]", indices.shape[1], 1, MAX_ROWS)
    _check.between(op, "num_experts", num_experts, 1, MAX_EXPERTS)
    _check.between(op, "align", align, 1, MAX_ROWS)
    capacity = indices.numel() + num_experts * (align - 1)
    if capacity > MAX_ROWS:
        raise ValueError(
            f"{op}: indices: expected at most {MAX_ROWS} rows (row ids are int32), got "
            f"T*K + E*(align-1) = {capacity}; split the tokens"
        )
    if indices.device.type != "cpu":  # the CPU engine looks at every id by itself
        check_ids(op, indices, num_experts, num_experts)
    return PermutePlan(*_ops.plan(indices, num_experts, align))


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
    _check_rows("permute", "x", x, plan.row_map, plan.row_map.shape[0], "T")
    return _ops.permute(x, plan.row_map, plan.source)


def permute_weights(weights: Tensor, plan: PermutePlan) -> Tensor:
    """Carry the weight of every pair to its row: ``w[r] = weights.flatten()[plan.source[r]]``.

    Parameters
    ----------
    weights : Tensor [T, K] float32
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
    _check_weights("permute_weights", weights, plan)
    # A pair is a token with one slot.
    return _ops.permute(weights.reshape(-1, 1), plan.row_map.reshape(-1, 1), plan.source).view(-1)


def unpermute(y: Tensor, plan: PermutePlan, weights: Tensor | None = None) -> Tensor:
    """Bring rows back to their tokens: ``x[t] = sum_k weights[t, k] * y[plan.row_map[t, k]]``.

    Parameters
    ----------
    y : Tensor [cap, H], float32, bfloat16 or float16
    plan : PermutePlan
    weights : Tensor [T, K] float32, optional
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
    op = "unpermute"
    _check_rows(op, "y", y, plan.row_map, plan.source.shape[0], "cap")
    _check.dtype(op, "y", y, tuple(_native.DTYPES))
    if weights is not None:
        _check_weights(op, weights, plan)
    return _ops.unpermute(y, plan.row_map, plan.source, weights)


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
    op = "sort_chunks"
    _check_rows(op, "x", x, x, x.shape[0] if isinstance(x, Tensor) and x.dim() else 0, "R")
    for name, value in (("split_sizes", split_sizes), ("order", order)):
        _check.tensor(op, name, value)
        _check.dtype(op, name, value, (torch.int32,))
        _check.shape(op, name, value, ("C",) if value is split_sizes else (len(split_sizes),))
        _check.same_device(op, name, value, "x", x)
    _check.between(op, "split_sizes.shape[0]", split_sizes.shape[0], 0, MAX_CHUNKS)
    return _ops.sort_chunks(x, split_sizes, order, False)


def check_ids(op: str, indices: Tensor, num_experts: int, highest: int | None = None) -> None:
    """Refuse ids out of range, where reading them costs no synchronisation or was asked for."""
    kind = indices.device.type
    readable = kind == "cpu" or (kind != "meta" and os.environ.get("KIMI_OPS_CHECK") == "1")
    if not readable or indices.numel() == 0:
        return
    highest = num_experts - 1 if highest is None else highest
    low, high = (int(value) for value in indices.aminmax())
    if low < -1 or high > highest:
        raise ValueError(
            f"{op}: indices: expected ids in -1 .. {highest}, got {low} .. {high}; mark "
            "dropped pairs with -1"
        )


def _check_rows(op: str, name: str, x: Tensor, like: Tensor, rows: int, letter: str) -> None:
    _check.tensor(op, name, x)
    if x.dtype == torch.float64:
        raise TypeError(
            f"{op}: {name}: expected a dtype of at most 32 bits, got float64; "
            f"kimi_ops.reference.permute.{op} computes in float64"
        )
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(
            f"{op}: {name}: expected shape [{letter}={rows}, H], got {list(x.shape)}; use the "
            "plan made for these rows"
        )
    if x.device != like.device:
        raise ValueError(
            f"{op}: {name}: expected on {like.device} as the plan, got {x.device}; move it"
        )


def _check_weights(op: str, weights: Tensor, plan: PermutePlan) -> None:
    _check.tensor(op, "weights", weights)
    _check.dtype(op, "weights", weights, (torch.float32,))
    _check.shape(
        op, "weights", weights, tuple(plan.row_map.shape), "pass one for each pair of the plan"
    )
    _check.same_device(op, "weights", weights, "plan.row_map", plan.row_map)
