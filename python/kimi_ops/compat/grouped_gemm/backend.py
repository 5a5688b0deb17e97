# SPDX-License-Identifier: MIT
"""The product under `ops.gmm`."""

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.moe.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from kimi_ops.routing import as_int32

__all__ = ["gmm"]


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """Products of consecutive groups of rows, ``batch_sizes[e]`` of them in group e.

    ======= ======= ========== ========== ============================= ==========
    trans_a trans_b a          b          result of group e             shape
    ======= ======= ========== ========== ============================= ==========
    False   False   [R, K]     [E, K, N]  ``a[rows] @ b[e]``            [R, N]
    False   True    [R, K]     [E, N, K]  ``a[rows] @ b[e].T``          [R, N]
    True    False   [R, K]     [R, N]     ``a[rows].T @ b[rows]``       [E, K, N]
    ======= ======= ========== ========== ============================= ==========

    Parameters
    ----------
    a, b : Tensor
        Of one floating dtype; b in any stride order.
    batch_sizes : Tensor [E] int32 or int64
        Rows behind their sum give zeros. May lie on the CPU.
    c : Tensor, optional
        Receives the result; not together with gradients.

    Returns
    -------
    Tensor, the dtype of a
        Differentiable in a and b, where c is not given.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes or shapes, both operands transposed, sizes that pass R (see `grouped_gemm`).

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.grouped_gemm import backend
    >>> a, b = torch.ones(3, 2), torch.ones(2, 2, 4)
    >>> backend.gmm(a, b, torch.tensor([1, 2])).shape
    torch.Size([3, 4])
    >>> backend.gmm(a, torch.ones(3, 5), torch.tensor([1, 2]), trans_a=True)[:, 0, 0].tolist()
    [1.0, 2.0]
    """
    if trans_a and trans_b:
        raise ValueError("gmm: trans_a: expected one transposed operand, got both; pass one")
    for name, value in (("a", a), ("b", b), ("batch_sizes", batch_sizes)):
        _check.tensor("gmm", name, value)
    _check.dtype("gmm", "batch_sizes", batch_sizes, (torch.int64, torch.int32))
    _check.shape("gmm", "batch_sizes", batch_sizes, ("E",))
    _check.shape("gmm", "a", a, ("R", "K"))
    offsets = as_int32(batch_sizes.cumsum(0)).to(a.device)
    if trans_a:
        _check.shape("gmm", "b", b, (a.shape[0], "N"))
        return grouped_gemm_wgrad(a, b, offsets, out=c)
    groups, depth = len(batch_sizes), a.shape[1]
    _check.shape("gmm", "b", b, (groups, "N", depth) if trans_b else (groups, depth, "N"))
    return grouped_gemm(a, b.transpose(1, 2) if trans_b else b, offsets, out=c)
