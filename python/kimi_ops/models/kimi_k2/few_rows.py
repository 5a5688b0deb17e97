# SPDX-License-Identifier: MIT
"""Products of a few rows in decode on the CPU, where the bytes of the weights are the time.

torch's bf16 products read weights at half of the memory's rate, and copy those of each head. A
`grouped_gemm` reads them once, as they lie. Sums are fp32 and rounded once either way, in an order
of their own here: where rows have to be batch invariant, torch computes them as before.
"""

from functools import cache

import torch
from torch import Tensor, nn

from kimi_ops import _native, grouped_gemm, is_batch_invariant

ROWS = 12  # that every vector engine multiplies by weights read once
WORTH = 1 << 18  # elements of weights that take longer to read than a call takes


def serves_few_rows(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether `few_rows` may multiply `rows` rows of x by the weight: bf16 on the CPU, in plain
    tensors that nobody differentiates, traces or transforms."""
    return (
        not torch.compiler.is_compiling()  # before numbers are compared: sizes are symbols there
        and 0 < rows <= ROWS
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() >= WORTH
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and not is_batch_invariant()
        and _native.engine.cpu_engine("grouped_gemm") != "portable"
    )


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias for each group: [G, rows, N] from [G, rows, K], [G, K, N], [G, N]."""
    groups, rows, depth = x.shape
    y = grouped_gemm(x.reshape(-1, depth), weight, _ends(groups, rows), bias=bias)
    return y.view(groups, rows, -1)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight of each head: [B, heads, S, N] from [B, heads, S, K] and [heads, K, N]."""
    batch, heads, tokens, depth = x.shape
    # heads outside: a batch outside would copy the weights for each sequence
    rows = x.transpose(0, 1).reshape(heads, batch * tokens, depth)
    product = few_rows if serves_few_rows(x, weight, batch * tokens) else torch.bmm
    return product(rows, weight).view(heads, batch, tokens, -1).transpose(0, 1)


@cache
def _ends(groups: int, rows: int) -> Tensor:
    return torch.arange(1, groups + 1, dtype=torch.int32, device="cpu") * rows
