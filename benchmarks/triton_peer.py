# SPDX-License-Identifier: MIT
"""A grouped product in Triton, the peer that a Triton user would write: one launch, tiles of a
group start at its own first row, the group of a tile is searched for in the offsets on the device.

`triton_grouped_gemm` is None where triton is missing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

triton_grouped_gemm: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

if triton is not None:
    CONFIGS = [
        triton.Config({"ROWS": rows, "COLS": cols, "DEPTH": 64}, num_warps=warps, num_stages=stages)
        for rows, cols, warps, stages in (
            (128, 256, 8, 3), (128, 128, 8, 4), (64, 256, 8, 4), (64, 128, 4, 4), (16, 128, 4, 5),
        )
    ]  # fmt: skip

    @triton.autotune(CONFIGS, key=["average", "n", "k"])
    @triton.jit
    def _kernel(
        a, b, offsets, out, rows, n, k, experts, average,
        a_row, b_expert, b_k, b_n,
        ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    ) -> None:  # fmt: skip
        row_tile, col_tile = tl.program_id(0), tl.program_id(1)
        expert, begin, end = row_tile * 0, row_tile * 0, tl.load(offsets)
        tiles = tl.cdiv(end, ROWS)
        while (row_tile >= tiles) & (expert + 1 < experts):
            expert += 1
            begin = end
            end = tl.load(offsets + expert)
            tiles += tl.cdiv(end - begin, ROWS)
        if row_tile < tiles:
            first = begin + (row_tile - tiles + tl.cdiv(end - begin, ROWS)) * ROWS
            r = first + tl.arange(0, ROWS)
            c = col_tile * COLS + tl.arange(0, COLS)
            d = tl.arange(0, DEPTH)
            left = a + r[:, None].to(tl.int64) * a_row + d[None, :]
            right = b + expert.to(tl.int64) * b_expert + d[:, None] * b_k + c[None, :] * b_n
            total = tl.zeros((ROWS, COLS), dtype=tl.float32)
            for start in range(0, k, DEPTH):
                inside = d + start < k
                x = tl.load(left, mask=(r < end)[:, None] & inside[None, :], other=0.0)
                w = tl.load(right, mask=(c < n)[None, :] & inside[:, None], other=0.0)
                total = tl.dot(x, w, total)
                left += DEPTH
                right += DEPTH * b_k
            to = out + r[:, None].to(tl.int64) * n + c[None, :]
            tl.store(to, total.to(out.dtype.element_ty), mask=(r < end)[:, None] & (c < n)[None, :])

    def _multiply(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        """a [R, K] with contiguous rows, b [E, K, N] any strides -> [R, N]; rows after the last
        group stay unset."""
        (rows, k), (experts, _, n) = a.shape, b.shape
        out = torch.empty((rows, n), dtype=a.dtype, device=a.device)

        def grid(meta: dict[str, Any]) -> tuple[int, int]:
            return triton.cdiv(rows, meta["ROWS"]) + experts, triton.cdiv(n, meta["COLS"])

        average = triton.next_power_of_2(max(1, rows // experts))
        _kernel[grid](
            a, b, offsets, out, rows, n, k, experts, average, a.stride(0), *b.stride()
        )  # fmt: skip
        return out

    triton_grouped_gemm = _multiply
