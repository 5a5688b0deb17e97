# SPDX-License-Identifier: MIT
"""One matrix product for every expert's rows, in plain torch.

On the CPU each group with rows is one `torch.mm` into its slice of the output. On other devices
`torch.nn.functional.grouped_mm` does the groups without a host read; N and K are padded there to
its 16-byte strides, and the rows past the last group, which it leaves unset, are cleared.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STRIDE_BYTES = 16


def _groups(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every group with rows; offsets live on the CPU."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return [(e, s, t) for e, (s, t) in enumerate(zip(starts, ends, strict=True)) if t > s]


def _pad(x: Tensor, *dims: int) -> Tensor:
    """x with the sizes of `dims` rounded up to whole 16-byte strides, zeros added."""
    multiple = _STRIDE_BYTES // x.element_size()
    for dim in dims:
        missing = -x.shape[dim] % multiple
        if missing:
            x = torch.cat([x, x.new_zeros([*x.shape[:dim], missing, *x.shape[dim + 1 :]])], dim)
    return x


def live_rows(rows: int, offsets: Tensor) -> Tensor:
    return (torch.arange(rows, device=offsets.device) < offsets[-1])[:, None]


def expert_of_row(rows: int, offsets: Tensor) -> Tensor:
    """The group of each row; rows past the last group count to the last one."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, row, right=True).clamp(max=offsets.numel() - 1)


def forward(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out[r] = a[r] @ b[e(r)] + bias[e(r)], computed in fp32 where `out` is wider than `a`."""
    if a.device.type != "cpu":
        product = F.grouped_mm(_pad(a, 1), _pad(b, 1, 2), offs=offsets)[:, : b.shape[2]]
        if bias is not None:
            product = product + bias[expert_of_row(a.shape[0], offsets)]
        return out.copy_(product.masked_fill(~live_rows(a.shape[0], offsets), 0))
    end = 0
    for e, start, end in _groups(offsets):  # noqa: B007 (the last end starts the tail)
        rows, weight, target = a[start:end].to(out.dtype), b[e].to(out.dtype), out[start:end]
        if bias is None:
            torch.mm(rows, weight, out=target)
        else:
            torch.addmm(bias[e].to(out.dtype), rows, weight, out=target)
    out[end:].zero_()
    return out


def wgrad(a: Tensor, dc: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """out[e] (+)= a[rows of e]^T @ dc[rows of e]; an expert without rows adds nothing."""
    if a.device.type != "cpu":
        live = live_rows(a.shape[0], offsets)
        left = _pad(a.masked_fill(~live, 0), 1).transpose(0, 1)
        product = F.grouped_mm(left, _pad(dc.masked_fill(~live, 0), 1), offs=offsets)
        product = product[:, : a.shape[1], : dc.shape[1]].to(out.dtype)
        return out.add_(product) if accumulate else out.copy_(product)
    groups = _groups(offsets)
    if not accumulate and len(groups) < offsets.numel():
        out.zero_()
    for e, start, end in groups:
        rows, gradient = a[start:end].to(out.dtype), dc[start:end].to(out.dtype)
        if accumulate:
            torch.addmm(out[e], rows.t(), gradient, out=out[e])
        else:
            torch.mm(rows.t(), gradient, out=out[e])
    return out


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return forward(a, b, offsets, bias, a.new_empty(a.shape[0], b.shape[2], dtype=dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets, bias = ctx.saved_tensors
        da = db = dbias = None
        dc = dc.contiguous().to(a.dtype)
        if ctx.needs_input_grad[0]:
            da = _GroupedGemm.apply(dc, b.transpose(1, 2), offsets, None, a.dtype)
        if ctx.needs_input_grad[1]:
            db = _Wgrad.apply(a, dc, offsets, b)
        if bias is not None and ctx.needs_input_grad[3]:
            ones = dc.new_ones(dc.shape[0], 1)
            dbias = _Wgrad.apply(ones, dc, offsets, bias[:, None])[:, 0].to(bias.dtype)
        return da, db, None, dbias, None


class _Wgrad(torch.autograd.Function):
    """In the stride order of b, so that its .grad needs no copy."""

    @staticmethod
    def forward(a: Tensor, dc: Tensor, offsets: Tensor, b: Tensor) -> Tensor:
        return wgrad(a, dc, offsets, torch.empty_like(b, dtype=a.dtype), accumulate=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        """Both operands are rows: each gets the other's rows times its group's matrix."""
        a, dc, offsets = ctx.saved_tensors
        da = ddc = None
        if ctx.needs_input_grad[0]:
            da = _GroupedGemm.apply(dc, dw.transpose(1, 2), offsets, None, dw.dtype)
        if ctx.needs_input_grad[1]:
            ddc = _GroupedGemm.apply(a, dw, offsets, None, dw.dtype)
        return da, ddc, None, None


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """c [R, N] from a [R, K] and b [E, K, N] in any stride order; differentiable without `out`."""
    if out is not None:
        return forward(a, b, offsets, bias, out)
    return _GroupedGemm.apply(a, b, offsets, bias, out_dtype or a.dtype)


def grouped_gemm_wgrad(
    a: Tensor,
    dc: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """[E, K, N] from a [R, K] and dc [R, N]."""
    if out is None:
        out = a.new_empty(offsets.numel(), a.shape[1], dc.shape[1])
    return wgrad(a, dc, offsets, out, accumulate)
