# SPDX-License-Identifier: MIT
"""Differentiable products and permutations by an index map."""

from typing import NoReturn

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.compat import _maps
from kimi_ops.compat.grouped_gemm import backend
from kimi_ops.moe.permute import permute as permute_rows

__all__ = ["gmm", "permute", "sinkhorn_kernel", "unpermute"]


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """`backend.gmm` without ``trans_a``: ``a[rows of e] @ b[e]``, or ``b[e].T``.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.grouped_gemm import ops
    >>> ops.gmm(torch.ones(3, 2), torch.ones(2, 4, 2), torch.tensor([1, 2]), trans_b=True).shape
    torch.Size([3, 4])
    """
    return backend.gmm(a, b, batch_sizes, trans_b=trans_b)


def permute(
    input_act: Tensor, indices: Tensor, num_out_tokens: int | None = None, max_token_num: int = 0
) -> tuple[Tensor, Tensor]:
    """Copy token rows to their experts' groups.

    Parameters
    ----------
    input_act : Tensor [T, H], any dtype but float64
    indices : Tensor [T, K] or [T], integers
        Experts 0 .. 1023; -1 (or 1024) is a dropped pair.
    num_out_tokens : int, optional
        Rows of the result: those behind it are dropped, which are the last experts'. None and 0
        mean T * K.
    max_token_num : int
        A workspace's size elsewhere. There is no workspace.

    Returns
    -------
    Tensor [R, H]
        Differentiable; rows in the order of a stable sort by expert.
    Tensor [K * T] int32
        ``row_id_map[k * T + t]``, the row of a pair, -1 where it was dropped.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.grouped_gemm import ops
    >>> rows, row_id_map = ops.permute(torch.tensor([[1.0], [2.0]]), torch.tensor([[1, 0], [0, 2]]))
    >>> rows.flatten().tolist(), row_id_map.tolist()
    ([1.0, 2.0, 1.0, 2.0], [2, 1, 0, 3])
    """
    plan = _maps.by_index("permute", "indices", indices, len(input_act), num_out_tokens or None)
    return permute_rows(input_act, plan), plan.row_map.t().reshape(-1)


def unpermute(input_act: Tensor, row_id_map: Tensor, probs: Tensor | None = None) -> Tensor:
    """Bring rows back: ``x[t] = sum_k probs[t, k] * input_act[row_id_map[k * T + t]]``.

    Parameters
    ----------
    input_act : Tensor [R, H], float32, bfloat16 or float16
    row_id_map : Tensor [K * T] int32 or int64
        From `permute`.
    probs : Tensor [T, K], optional
        Where absent every pair is a token of its own: K is 1.

    Returns
    -------
    Tensor [T, H], the dtype of input_act
        Summed in fp32 and rounded once. Differentiable in input_act and probs.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.grouped_gemm import ops
    >>> x, indices = torch.tensor([[1.0], [2.0]]), torch.tensor([[1, 0], [0, 2]])
    >>> rows, row_id_map = ops.permute(x, indices)
    >>> ops.unpermute(rows, row_id_map, torch.full((2, 2), 0.5)).tolist()
    [[1.0], [2.0]]
    """
    _check.tensor("unpermute", "row_id_map", row_id_map)
    _check.dtype("unpermute", "row_id_map", row_id_map, (torch.int32, torch.int64))
    slots = 1
    if probs is not None:
        _check.tensor("unpermute", "probs", probs)
        _check.shape("unpermute", "probs", probs, ("T", "K"))
        _check.shape("unpermute", "row_id_map", row_id_map, (probs.numel(),), "one for each prob")
        slots = probs.shape[1]
    return _maps.rows_to_tokens(input_act, row_id_map.view(slots, -1).t(), probs)


def sinkhorn_kernel(cost: Tensor, tol: float = 0.0001) -> NoReturn:
    """Refused: no op here balances by Sinkhorn's iteration.

    Raises
    ------
    NotImplementedError
        Always; `kimi_ops.update_expert_bias_` balances without a loss.
    """
    raise NotImplementedError(
        "sinkhorn_kernel: expected another router, got Sinkhorn's, which is not served; balance "
        "with topk_gate(expert_bias=) and update_expert_bias_"
    )
