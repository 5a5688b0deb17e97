# SPDX-License-Identifier: MIT
"""One matrix product for every expert's rows, in plain torch.

On the CPU each group with rows is one `torch.mm` into its slice of the output. On other devices
`torch.nn.functional.grouped_mm` does the groups without a host read; N and K are padded there to
its 16-byte strides, and the rows of no group, which it leaves unset, are cleared. Groups with
starts of their own are every second one of twice as many there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STRIDE_BYTES = 16


def _groups(offsets: Tensor, starts: Tensor | None) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every group with rows; offsets live on the CPU."""
    ends = offsets.tolist()
    firsts = [0, *ends][: len(ends)] if starts is None else starts.tolist()
    return [(e, s, t) for e, (s, t) in enumerate(zip(firsts, ends, strict=True)) if t > s]


def _interleaved(offsets: Tensor, starts: Tensor | None, *stacks: Tensor) -> tuple[Tensor, ...]:
    """The groups as ones that follow each other, and what belongs to each."""
    if starts is None:
        return offsets, *stacks
    twice = torch.stack([starts, offsets], dim=1).flatten()
    return twice, *(stack.repeat_interleave(2, dim=0) for stack in stacks)


def _pad(x: Tensor, *dims: int) -> Tensor:
    """x with the sizes of `dims` rounded up to whole 16-byte strides, zeros added."""
    multiple = _STRIDE_BYTES // x.element_size()
    for dim in dims:
        missing = -x.shape[dim] % multiple
        if missing:
            x = torch.cat([x, x.new_zeros([*x.shape[:dim], missing, *x.shape[dim + 1 :]])], dim)
    return x


def live_rows(rows: int, offsets: Tensor, starts: Tensor | None = None) -> Tensor:
    """[rows, 1]: whether a group has the row."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    if starts is None:
        return (row < offsets[-1:].sum())[:, None]  # without groups, none
    in_group = torch.searchsorted(starts, row, right=True) > torch.searchsorted(
        offsets, row, right=True
    )
    return in_group[:, None]


def expert_of_row(rows: int, offsets: Tensor) -> Tensor:
    """The group of each row; rows past the last group count to the last one."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, row, right=True).clamp(max=offsets.numel() - 1)


def forward(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor,
    starts: Tensor | None = None, accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """out[r] (+)= a[r] @ b[e(r)] + bias[e(r)], computed in fp32 where `out` is wider than `a`."""
    if a.device.type != "cpu":
        ends, stack = _interleaved(offsets, starts, _pad(b, 1, 2))
        product = F.grouped_mm(_pad(a, 1), stack, offs=ends)[:, : b.shape[2]]
        if bias is not None:
            product = product + bias[expert_of_row(a.shape[0], offsets)]
        product = product.masked_fill(~live_rows(a.shape[0], offsets, starts), 0)
        return out.add_(product) if accumulate else out.copy_(product)
    end = 0
    for e, start, stop in _groups(offsets, starts):
        if not accumulate:
            out[end:start].zero_()
        end = stop
        rows, weight, target = a[start:end].to(out.dtype), b[e].to(out.dtype), out[start:end]
        if accumulate:
            product = rows @ weight
            target += product if bias is None else product + bias[e].to(out.dtype)
        elif bias is None:
            torch.mm(rows, weight, out=target)
        else:
            torch.addmm(bias[e].to(out.dtype), rows, weight, out=target)
    if not accumulate:
        out[end:].zero_()
    return out


def wgrad(
    a: Tensor, dc: Tensor, offsets: Tensor, out: Tensor, accumulate: bool,
    starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out[e] (+)= a[rows of e]^T @ dc[rows of e]; an expert without rows adds nothing."""
    if a.device.type != "cpu":
        live = live_rows(a.shape[0], offsets, starts)
        left = _pad(a.masked_fill(~live, 0), 1).transpose(0, 1)
        (ends,) = _interleaved(offsets, starts)
        product = F.grouped_mm(left, _pad(dc.masked_fill(~live, 0), 1), offs=ends)
        product = product if starts is None else product[1::2]
        product = product[:, : a.shape[1], : dc.shape[1]].to(out.dtype)
        return out.add_(product) if accumulate else out.copy_(product)
    groups = _groups(offsets, starts)
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
        ctx: Any, a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype,
        starts: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(a, b, offsets, bias, starts)
        out = a.new_empty(a.shape[0], b.shape[2], dtype=dtype)
        return forward(a, b, offsets, bias, out, starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets, bias, starts = ctx.saved_tensors
        da = db = dbias = None
        dc = dc.contiguous().to(a.dtype)
        if ctx.needs_input_grad[0]:
            da = forward(dc, b.transpose(1, 2), offsets, None, torch.empty_like(a), starts)
        if ctx.needs_input_grad[1]:  # in b's own stride order, so that .grad needs no copy
            db = wgrad(a, dc, offsets, torch.empty_like(b), False, starts)
        if bias is not None and ctx.needs_input_grad[3]:
            ones = dc.new_ones(dc.shape[0], 1)
            empty = dc.new_empty(b.shape[0], 1, b.shape[2])
            dbias = wgrad(ones, dc, offsets, empty, False, starts)[:, 0].to(bias.dtype)
        return da, db, None, dbias, None, None


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    starts: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """c [R, N] from a [R, K] and b [E, K, N] in any stride order; differentiable without `out`."""
    if out is not None:
        return forward(a, b, offsets, bias, out, starts, accumulate)
    return _GroupedGemm.apply(a, b, offsets, bias, out_dtype or a.dtype, starts)


def grouped_gemm_wgrad(
    a: Tensor,
    dc: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    starts: Tensor | None = None,
) -> Tensor:
    """[E, K, N] from a [R, K] and dc [R, N]."""
    if out is None:
        out = a.new_empty(offsets.numel(), a.shape[1], dc.shape[1])
    return wgrad(a, dc, offsets, out, accumulate, starts)
