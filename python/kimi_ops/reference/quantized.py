# SPDX-License-Identifier: MIT
"""The product of FP8 rows and FP8 blocks, in plain torch; the forms are in `kimi_ops.formats`."""

import torch
from torch import Tensor

from kimi_ops.formats import FP8_BLOCK


def grouped_gemm_fp8(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    offsets: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """c[r, n] = sum_kb a_scale[r, kb] b_scale[e, n / 128, kb] sum_{k in kb} a[r, k] b[e, n, k].

    Sums of 128 products, then those sums times both scales, all in `wide`; on the CPU.

    Parameters
    ----------
    a : data [R, K] float8_e4m3fn, scale [R, ceil(K / 128)] float32
    b : data [E, N, K] float8_e4m3fn, scale [E, ceil(N / 128), ceil(K / 128)] float32
    offsets : Tensor [E] int32
    bias : Tensor [E, N], optional

    Returns
    -------
    Tensor [R, N] `dtype`
    """
    (a_data, a_scale), (b_data, b_scale) = a, b
    rows, n, k = a_data.shape[0], b_data.shape[1], b_data.shape[2]
    total = torch.zeros(rows, n, dtype=wide, device=a_data.device)
    start = 0
    for e, end in enumerate(offsets.tolist()):
        by_column = b_scale[e].to(wide).repeat_interleave(FP8_BLOCK, 0)[:n]
        for block, first in enumerate(range(0, k, FP8_BLOCK)):
            depth = slice(first, first + FP8_BLOCK)
            partial = a_data[start:end, depth].to(wide) @ b_data[e, :, depth].to(wide).t()
            scale = a_scale[start:end, block, None].to(wide) * by_column[:, block]
            total[start:end] += scale * partial
        if bias is not None:
            total[start:end] += bias[e].to(wide)
        start = end
    return total.to(dtype)
