# SPDX-License-Identifier: MIT
"""How the parameters that Muon takes fall into matrices: heads, gate and up, layouts of experts."""

from __future__ import annotations

from typing import NamedTuple, get_args

from torch import Tensor, nn

from kimi_ops.choices import ExpertLayout
from kimi_ops.optim.muon_roles import Survey, is_conv1d, is_linear, is_stack

EXPERT_LAYOUTS = get_args(ExpertLayout)
_GATE_UP = ("gate_up_proj", "w13", "w12", "w_gate_up", "gate_up")
_DOWN = ("down_proj", "w2", "wo", "w_down", "down")


class Cut(NamedTuple):
    """Keys of a group."""

    num_heads: int | None = None
    head_dim: int = 0
    split_sizes: tuple[int, ...] | None = None
    interleave: int | None = None
    transposed: bool = False
    batch_dims: str = "leading"


WHOLE = Cut()


def cut_of(
    survey: Survey, name: str, param: Tensor, layout: str | None, per_head: bool
) -> Cut | str:
    """The cut of a parameter, or why it is not known."""
    module, path, leaf = survey.module(name)
    if is_linear(module, leaf, param):
        if is_conv1d(module):
            return Cut(transposed=True)
        outer, _, projection = path.rpartition(".")
        return _head_cut(survey.modules[outer], projection) if per_head else WHOLE
    if isinstance(module, nn.modules.conv._ConvNd):
        return Cut(batch_dims="flatten")
    if isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight":
        return Cut(split_sizes=(param.shape[0] // 3,) * 3)
    return _stack_cut(module, leaf, param, layout) if is_stack(module, path, leaf, param) else WHOLE


def _head_cut(attention: nn.Module, projection: str) -> Cut:
    """How the weight of a projection of latent attention falls into heads."""
    heads = getattr(attention, "num_heads", None)
    if not isinstance(heads, int) or not hasattr(attention, "kv_b_proj"):
        return WHOLE
    if projection == "kv_b_proj":
        sizes = (attention.qk_nope_head_dim, attention.v_head_dim)
        return Cut(heads, 0, sizes)  # type: ignore[arg-type]
    if projection in ("q_b_proj", "q_proj"):
        return Cut(heads)
    return Cut(heads, 1) if projection == "o_proj" else WHOLE


def _stack_cut(module: nn.Module, leaf: str, stack: Tensor, layout: str | None) -> Cut | str:
    fused, down = _fused(module), _beside(module, _DOWN)
    if fused is None:
        return Cut(transposed=layout is not None and layout.startswith("columns"))
    columns = _columns(fused, down, layout)
    if stack is not fused:
        return Cut(transposed=columns)
    # what transformers' experts say of themselves; rows are halves everywhere else
    halves = getattr(module, "is_concatenated", None if columns else True)
    if layout is not None:
        halves = not layout.endswith("interleaved")
    if halves is None:
        return "gate and up in columns, as halves or by turns: give expert_layout"
    axis = 1 if columns else 0
    width = stack.shape[1 + axis] // 2
    if halves:
        return Cut(head_dim=axis, split_sizes=(width, width), transposed=columns)
    return Cut(head_dim=axis, interleave=2, transposed=columns)


def _columns(fused: Tensor, down: Tensor | None, layout: str | None) -> bool:
    """Whether gate and up are columns, [E, H, 2F] beside [E, F, H], or rows, [E, 2F, H] beside
    [E, H, F]: no pair of shapes is both. Rows, the layout of this package, where neither the caller
    nor a down stack tells."""
    asked = None if layout is None else layout.startswith("columns")
    _, rows, columns = fused.shape
    if down is None:
        fits = {False: rows % 2 == 0, True: columns % 2 == 0}
        asked = bool(asked)
    else:
        inner, outer = down.shape[1:]
        fits = {False: (rows, columns) == (2 * outer, inner)}
        fits[True] = (rows, columns) == (outer, 2 * inner)
        if asked is None and any(fits.values()):
            asked = fits[True]
    if asked is None or not fits[asked]:
        beside = "none" if down is None else list(down.shape)
        raise ValueError(
            "muon_param_groups: expert_layout: expected rows, [E, 2F, H] beside a down stack "
            f"[E, H, F], or columns, [E, H, 2F] beside [E, F, H], got {layout!r} for "
            f"{list(fused.shape)} beside {beside}; choose what fits"
        )
    return asked


def _fused(module: nn.Module) -> Tensor | None:
    """The stack of both gate and up; `w1` is one where no `w3` is beside it and it is as wide."""
    down, first = _beside(module, _DOWN), _beside(module, ("w1",))
    if down is not None and first is not None and not hasattr(module, "w3"):
        doubled = (2 * down.shape[2], 2 * down.shape[1])
        if first.shape[1] == doubled[0] or first.shape[2] == doubled[1]:
            return first
    return _beside(module, _GATE_UP)


def _beside(module: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    found = [getattr(module, name, None) for name in names]
    return next((x for x in found if isinstance(x, Tensor) and x.ndim == 3), None)
