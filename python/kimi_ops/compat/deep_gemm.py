# SPDX-License-Identifier: MIT
"""DeepGEMM's grouped products, the signatures of 2.6 (`deep_gemm`).

Results go into d, and nothing is returned; no gradients. Groups need no alignment, rows that belong
to no group become zero. What the functions for FP8 take is what Hopper takes there: float32 scales,
of 1 x 128 for rows and 128 x 128 for weights.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.compat._arguments import only
from kimi_ops.moe.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from kimi_ops.moe.permute import permute, permute_plan, unpermute
from kimi_ops.moe.quantized import Fp8BlockWeight, Fp8Rows

__all__ = [
    "k_grouped_bf16_gemm_tn_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]
_LABELS = "label each row with its group"


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """Each row times its group's matrix: ``d[r] = a[r] @ b[grouped_layout[r]].T``.

    Parameters
    ----------
    a : Tensor [M, K] bfloat16
    b : Tensor [G, N, K] bfloat16, any stride order
    d : Tensor [M, N] bfloat16
    grouped_layout : Tensor [M] int32
        Group of each row, not decreasing, -1 for padding anywhere: zero rows.
    compiled_dims : str
        What theirs compiles for; nothing is compiled.
    use_psum_layout, expected_m_for_psum_layout
        Not served.
    ensure_zero_padding : bool
        True in any case.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes or shapes, decreasing groups (looked at on the CPU only), gradients wanted.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.deep_gemm import m_grouped_bf16_gemm_nt_contiguous
    >>> a, b = torch.ones(4, 2).bfloat16(), torch.ones(2, 1, 2).bfloat16()
    >>> b[1] = 3
    >>> d = torch.empty(4, 1).bfloat16()
    >>> m_grouped_bf16_gemm_nt_contiguous(a, b, d, torch.tensor([0, -1, 1, 1], dtype=torch.int32))
    >>> d.flatten().tolist()
    [2.0, 0.0, 6.0, 6.0]
    """
    op = "m_grouped_bf16_gemm_nt_contiguous"
    _contiguous_options(op, use_psum_layout, expected_m_for_psum_layout)
    _bf16(op, a=a, b=b, d=d)
    _check.shape(op, "b", b, ("G", "N", "K"))
    _labelled(op, a, b.transpose(1, 2), d, len(b), grouped_layout)


def m_grouped_bf16_gemm_nn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """`m_grouped_bf16_gemm_nt_contiguous` of b [G, K, N]."""
    m_grouped_bf16_gemm_nt_contiguous(
        a, b.transpose(1, 2), d, grouped_layout, compiled_dims, use_psum_layout, ensure_zero_padding
    )


def m_grouped_bf16_gemm_nt_masked(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    compiled_dims: str = "nk",
) -> None:
    """The first rows of each group times its matrix: ``d[g, :m] = a[g, :m] @ b[g].T``.

    Only ``m = masked_m[g]`` rows are read and multiplied, where they lie.

    Parameters
    ----------
    a : Tensor [G, M, K] bfloat16
    b : Tensor [G, N, K] bfloat16
    d : Tensor [G, M, N] bfloat16
        Rows from m on become zero.
    masked_m : Tensor [G] int32
    expected_m : int
        A hint elsewhere.
    compiled_dims : str
        As in `m_grouped_bf16_gemm_nt_contiguous`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.deep_gemm import m_grouped_bf16_gemm_nt_masked
    >>> a, b = torch.ones(2, 2, 3).bfloat16(), torch.ones(2, 1, 3).bfloat16()
    >>> d = torch.empty(2, 2, 1).bfloat16()
    >>> m_grouped_bf16_gemm_nt_masked(a, b, d, torch.tensor([1, 2], dtype=torch.int32), 2)
    >>> d.flatten().tolist()
    [3.0, 0.0, 3.0, 3.0]
    """
    op = "m_grouped_bf16_gemm_nt_masked"
    _bf16(op, a=a, b=b, d=d)
    _check.shape(op, "a", a, ("G", "M", "K"))
    _check.shape(op, "b", b, (len(a), "N", a.shape[2]))
    _check_masked(op, a, d, masked_m)
    into = d if d.is_contiguous() else None
    c = grouped_gemm(a, b.transpose(1, 2), counts=masked_m, out=into)
    if into is None:
        d.copy_(c)


def k_grouped_bf16_gemm_tn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    ks_cpu: list[int] | None,
    grouped_layout: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """Products of two matrices of rows along the rows of each group: ``d[g] = c[g] + a_g.T @ b_g``.

    Parameters
    ----------
    a : Tensor [sum of ks, M] bfloat16
    b : Tensor [sum of ks, N] bfloat16
    d : Tensor [G, M, N] float32 or bfloat16
    ks_cpu : list of int, optional
        The rows of each group; compared with `grouped_layout` where that is on the CPU.
    grouped_layout : Tensor [G] int32
        The same numbers; those are used.
    c : Tensor [G, M, N], the dtype of d, optional
        May be d. Zero where absent.
    compiled_dims, use_psum_layout
        As in `m_grouped_bf16_gemm_nt_contiguous`.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.compat.deep_gemm import k_grouped_bf16_gemm_tn_contiguous
    >>> a, b, d = torch.ones(3, 1).bfloat16(), torch.ones(3, 1).bfloat16(), torch.ones(2, 1, 1)
    >>> ks = torch.tensor([1, 2], dtype=torch.int32)
    >>> k_grouped_bf16_gemm_tn_contiguous(a, b, d, [1, 2], ks, c=d)
    >>> d.flatten().tolist()
    [2.0, 3.0]
    """
    op = "k_grouped_bf16_gemm_tn_contiguous"
    only(op, "use_psum_layout", use_psum_layout, False, "pass the rows of each group")
    _bf16(op, a=a, b=b)
    _check.tensor(op, "grouped_layout", grouped_layout)
    _check.dtype(op, "grouped_layout", grouped_layout, (torch.int32,))
    _check.shape(op, "grouped_layout", grouped_layout, (len(d),))
    on_host = grouped_layout.device.type == "cpu"
    if ks_cpu is not None and on_host and list(ks_cpu) != grouped_layout.tolist():
        raise ValueError(
            f"{op}: ks_cpu: expected the numbers of grouped_layout, {grouped_layout.tolist()}, got "
            f"{list(ks_cpu)}; pass the same to both"
        )
    if c is not None and c is not d:
        _check.tensor(op, "c", c)
        _check.dtype(op, "c", c, (d.dtype,))
        _check.shape(op, "c", c, tuple(d.shape))
        d.copy_(c)
    offsets = grouped_layout.cumsum(0, dtype=torch.int32)
    grouped_gemm_wgrad(a, b, offsets, out=d, accumulate=c is not None)


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    grouped_layout: Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """`m_grouped_bf16_gemm_nt_contiguous` of FP8 rows and weights with their scales.

    Parameters
    ----------
    a : Tensor [M, K] float8_e4m3fn, Tensor [M, ceil(K / 128)] float32 in any strides
    b : Tensor [G, N, K] float8_e4m3fn, Tensor [G, ceil(N / 128), ceil(K / 128)] float32
    d : Tensor [M, N] bfloat16
    grouped_layout : Tensor [M] int32
    recipe, recipe_a, recipe_b : optional
        (1, 128, 128), (1, 128) and (128, 128): the only ones served.
    disable_ue8m0_cast : bool
        Scales are never rounded to powers of two, as on Hopper.
    compiled_dims, use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout
        As in `m_grouped_bf16_gemm_nt_contiguous`.
    """
    op = "m_grouped_fp8_gemm_nt_contiguous"
    _contiguous_options(op, use_psum_layout, expected_m_for_psum_layout)
    weight = _fp8(op, a, b, d, recipe, recipe_a, recipe_b)
    _labelled(op, Fp8Rows(*a), weight, d, weight.shape[0], grouped_layout)


def m_grouped_fp8_gemm_nt_masked(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """`m_grouped_bf16_gemm_nt_masked` of FP8 rows and weights with their scales.

    The rows that count are copied side by side, and their products back.

    Parameters
    ----------
    a : Tensor [G, M, K] float8_e4m3fn, Tensor [G, M, ceil(K / 128)] float32
    b : Tensor [G, N, K] float8_e4m3fn, Tensor [G, ceil(N / 128), ceil(K / 128)] float32
    d : Tensor [G, M, N] bfloat16
    masked_m, expected_m, compiled_dims
        As in `m_grouped_bf16_gemm_nt_masked`.
    recipe, recipe_a, recipe_b, disable_ue8m0_cast
        As in `m_grouped_fp8_gemm_nt_contiguous`.
    """
    op = "m_grouped_fp8_gemm_nt_masked"
    weight = _fp8(op, a, b, d, recipe, recipe_a, recipe_b)
    _check.shape(op, "a", a[0], (weight.shape[0], "M", weight.shape[2]))
    _check_masked(op, a[0], d, masked_m)
    groups, most = a[0].shape[:2]
    ids = torch.arange(groups, dtype=torch.int32, device=masked_m.device).unsqueeze(1)
    inside = torch.arange(most, device=masked_m.device) < masked_m.unsqueeze(1)
    plan = permute_plan(torch.where(inside, ids, -1).view(-1, 1), groups)
    rows = Fp8Rows(*(permute(part.flatten(0, 1), plan) for part in a))
    d.copy_(unpermute(grouped_gemm(rows, weight, plan.offsets), plan).view(d.shape))


def _bf16(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        _check.tensor(op, name, value)
        _check.dtype(op, name, value, (torch.bfloat16,))
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(
                f"{op}: {name}: no gradient flows into a given d, but it requires one; call under "
                "torch.no_grad(), or kimi_ops.grouped_gemm"
            )


def _contiguous_options(op: str, use_psum_layout: bool, expected_m: int | None) -> None:
    only(op, "use_psum_layout", use_psum_layout, False, _LABELS)
    only(op, "expected_m_for_psum_layout", expected_m, None, _LABELS)


def _fp8(
    op: str,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    recipe: Any,
    recipe_a: Any,
    recipe_b: Any,
) -> Fp8BlockWeight:
    for name, value, served in (
        ("recipe", recipe, (1, 128, 128)), ("recipe_a", recipe_a, (1, 128)),
        ("recipe_b", recipe_b, (128, 128)),
    ):  # fmt: skip
        if value is not None:
            only(op, name, tuple(value), served, "quantise by 1 x 128 and 128 x 128")
    for name, pair in (("a", a), ("b", b)):
        for part in pair:
            _check.tensor(op, name, part)
        _check.dtype(op, f"{name}[1]", pair[1], (torch.float32,), "packed scales are not served")
    _bf16(op, d=d)
    return Fp8BlockWeight(b[0].contiguous(), b[1].contiguous())


def _labelled(op: str, a: Any, b: Any, d: Tensor, groups: int, layout: Tensor) -> None:
    """Ends of the groups from the labels of the rows; padding lies inside a group, and is wiped."""
    _check.tensor(op, "grouped_layout", layout)
    _check.dtype(op, "grouped_layout", layout, (torch.int32,))
    _check.shape(op, "grouped_layout", layout, (len(d),), _LABELS)
    padding = layout < 0
    if layout.device.type == "cpu" and not torch.compiler.is_compiling():
        labels = layout[~padding]
        if bool((labels.diff() < 0).any() or (labels >= groups).any()):
            raise ValueError(
                f"{op}: grouped_layout: expected groups 0 .. {groups - 1}, not decreasing, got "
                "others; sort the rows by group"
            )
    end = torch.arange(1, len(layout) + 1, device=layout.device)
    ends = end.new_zeros(groups + 1)  # the last one takes the padding
    place = torch.where(padding, groups, layout).long()
    ends = ends.scatter_reduce(0, place, end, "amax")[:groups].cummax(0).values
    grouped_gemm(a, b, ends.int(), out=d)
    d.masked_fill_(padding.unsqueeze(1), 0)


def _check_masked(op: str, a: Tensor, d: Tensor, masked_m: Tensor) -> None:
    groups, most = a.shape[:2]
    _check.shape(op, "d", d, (groups, most, "N"))
    _check.tensor(op, "masked_m", masked_m)
    _check.dtype(op, "masked_m", masked_m, (torch.int32,))
    _check.shape(op, "masked_m", masked_m, (groups,))
