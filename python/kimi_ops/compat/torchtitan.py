# SPDX-License-Identifier: MIT
"""torchtitan's grouped experts: its function of 0.2, and the seam of its module after that
(`torchtitan.models.common.moe.GroupedExperts._grouped_mm`).

    GroupedExperts._grouped_mm = lambda self, **operands: grouped_mm(**operands)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops import _check
from kimi_ops.moe.grouped_gemm import grouped_gemm
from kimi_ops.routing import as_int32

__all__ = ["grouped_mm", "run_experts_grouped_mm"]


def grouped_mm(*, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    """``A[rows of e] @ B_t[e]``, group e up to row ``offs[e]``: `kimi_ops.grouped_gemm`.

    Parameters
    ----------
    A : Tensor [R, K]
    B_t : Tensor [E, K, N], any stride order
    offs : Tensor [E] int32
        Rows behind the last one are zero, and their gradients are.

    Returns
    -------
    Tensor [R, N]
        Differentiable.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.torchtitan import grouped_mm
    >>> offs = torch.tensor([1, 3], dtype=torch.int32)
    >>> grouped_mm(A=torch.ones(3, 2), B_t=torch.ones(2, 2, 4), offs=offs).shape
    torch.Size([3, 4])
    """
    return grouped_gemm(A, B_t, offs)


def run_experts_grouped_mm(
    w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor, num_tokens_per_expert: Tensor
) -> Tensor:
    """``w2[e] @ (silu(w1[e] @ x[r]) * (w3[e] @ x[r]))`` for the rows of each expert, in bfloat16.

    Parameters
    ----------
    w1, w3 : Tensor [E, F, H]
    w2 : Tensor [E, H, F]
        Of any floating dtype; cast, as x is.
    x : Tensor [R, H]
        Sorted by expert; rows behind the sum of the counts give zeros. No alignment of groups.
    num_tokens_per_expert : Tensor [E], integers

    Returns
    -------
    Tensor [R, H], the dtype of x
        Differentiable in x and the weights.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.torchtitan import run_experts_grouped_mm
    >>> w1, w2, w3 = torch.randn(2, 6, 4), torch.randn(2, 4, 6), torch.randn(2, 6, 4)
    >>> run_experts_grouped_mm(w1, w2, w3, torch.randn(5, 4), torch.tensor([2, 3])).shape
    torch.Size([5, 4])
    """
    op = "run_experts_grouped_mm"
    _check.tensor(op, "num_tokens_per_expert", num_tokens_per_expert)
    _check.shape(op, "num_tokens_per_expert", num_tokens_per_expert, (len(w1),))
    offs = as_int32(num_tokens_per_expert.cumsum(0, dtype=torch.int64))
    rows = x.bfloat16()
    gate, up = (grouped_mm(A=rows, B_t=w.bfloat16().mT, offs=offs) for w in (w1, w3))
    return grouped_mm(A=F.silu(gate) * up, B_t=w2.bfloat16().mT, offs=offs).type_as(x)
