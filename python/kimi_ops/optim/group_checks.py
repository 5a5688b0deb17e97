# SPDX-License-Identifier: MIT
"""The checks of a group of MuonClip, when it is added and before each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from operator import is_, itemgetter
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from kimi_ops import _check
from kimi_ops.choices import Algorithm, BatchDims
from kimi_ops.optim import engine
from kimi_ops.optim.learning_rate import adjusted_lr
from kimi_ops.optim.muon_blocks import blocks, is_flat, names, ns_options
from kimi_ops.optim.muon_mesh import check_gradient, sharded
from kimi_ops.optim.newton_schulz import check_options

_ADJUST = (None, "original", "match_rms_adamw")
ALGORITHMS = get_args(Algorithm)


# Key, the smallest and the smallest too large number, and what to do.
_NUMBERS = (
    ("lr", 0, math.inf, "1e-3 is usual"),
    ("weight_decay", 0, math.inf, "0.1 is usual"),
    ("momentum", 0, 1, "0.95 is usual"),
    ("eps", 0, math.inf, "1e-7 is usual"),
    ("adamw_eps", 0, math.inf, "1e-8 is usual"),
)
_SWITCHES = (
    "nesterov", "maximize", "capturable", "cautious_weight_decay", "transposed", "master_weights",
)  # fmt: skip
_TENSORS = ("lr", "weight_decay")  # may be tensors of one element
# What decides with the parameters on a group's matrices: seldom changed, and then checked again.
_structure = itemgetter(
    "algorithm", "adjust_lr_fn", "ns_dtype", "momentum_dtype", "ns_steps", "ns_coefficients",
    "ns_method", "ns_restarts", "eps", "batch_dims", "num_heads", "head_dim", "split_sizes",
    "interleave", "ns_max_batch", "transposed", "foreach",
)  # fmt: skip


class Checked:
    """A group that `step` can serve, and what must be as it was for that to be known still."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.options = _kept(_structure(group))
        self.params: list[Tensor] = list(group["params"])
        self.memory = _memory(group)
        self.sharded = any(map(sharded, self.params))
        # of the matrices whose rates a function of the caller's gives
        adjusts = group["algorithm"] == "muon" and callable(group["adjust_lr_fn"])
        examples = [torch.empty(p.shape, device="meta") for p in self.params if adjusts]
        cut = dict.fromkeys(block.shape[-2:] for x in examples for block in blocks(x, group))
        self.shapes = [(rows, columns) for rows, columns in cut]

    def holds(self, group: dict[str, Any]) -> bool:
        """Whether nothing but numbers has changed."""
        params, options = group["params"], _structure(group)
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and (all(map(is_, options, self.options)) or _kept(options) == self.options)
            and _memory(group) == self.memory
        )


def _kept(value: Any) -> Any:
    """`value` with copies of the lists in it, which may change; what is no plain value equals
    nothing."""
    if isinstance(value, (tuple, list)):
        return [_kept(item) for item in value]
    plain = value is None or isinstance(value, (str, int, float, torch.dtype)) or callable(value)
    return value if plain else object()


def _memory(group: dict[str, Any]) -> list[Any]:
    """What ``param.data = ...`` may change under the optimizer, beside shapes."""
    if group["batch_dims"] == "flatten":
        return [(p.dtype, p.stride()) for p in group["params"]]
    return [p.dtype for p in group["params"]]


def check_groups(groups: list[dict[str, Any]], known: list[Checked]) -> list[Checked]:
    """What a caller may have changed since the last step, before anything moves; `known` is what
    that step's check gave."""
    checked = []
    for i, group in enumerate(groups):
        if i < len(known) and known[i].holds(group):
            check_numbers(group)
            checked.append(known[i])
        else:
            check_group(group)
            checked.append(Checked(group))
        lr = group["lr"]
        if checked[i].shapes and not (isinstance(lr, Tensor) and not engine.on_host(lr)):
            for shape in checked[i].shapes:
                adjusted_lr(float(lr), group["adjust_lr_fn"], shape)
    return checked


def check_group(group: dict[str, Any]) -> None:
    """Raise for a group that ``step`` could not serve. Reads nothing from a device."""
    _check.choice("MuonClip", "algorithm", group["algorithm"], ALGORITHMS)
    check_numbers(group)
    for name, param in names(group):
        if not param.is_floating_point() or param.layout != torch.strided:
            raise TypeError(
                f"MuonClip: parameter {name}: expected a dense real floating-point tensor, got "
                f"{param.dtype}, {param.layout}; convert it"
            )
        if isinstance(param, UninitializedParameter):
            raise ValueError(
                f"MuonClip: parameter {name}: expected one with a shape, got a lazy one; call the "
                "model once before its optimizer is made"
            )
        if any(
            step == 0 < size - 1 for step, size in zip(param.stride(), param.shape, strict=True)
        ):
            raise ValueError(
                f"MuonClip: parameter {name}: expected memory of its own for each element, got "
                f"shape {tuple(param.shape)} with strides {param.stride()}; clone it"
            )
    if group["foreach"] not in (None, True, False):
        raise TypeError(
            f"MuonClip: foreach: expected True, False or None, got {group['foreach']!r}"
        )
    if group["algorithm"] == "muon":
        _check_muon(group)


def check_numbers(group: dict[str, Any]) -> None:
    """Raise for numbers and switches, which schedulers change from step to step."""
    _check_tensors(group)
    for key, low, high, mend in _NUMBERS:
        _check_number(key, group[key], low, high, mend)
    for key in _SWITCHES:
        if not isinstance(group[key], bool):
            raise TypeError(f"MuonClip: {key}: expected True or False, got {group[key]!r}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(
            f"MuonClip: betas: expected two numbers in [0, 1), got {betas!r}; "
            "AdamW's habit is (0.9, 0.95)"
        )
    for beta in betas:
        _check_number("betas", beta, 0, 1, "AdamW's habit is (0.9, 0.95)")
    limit = group["max_grad_norm"]
    if limit is not None:
        check_clip(limit, [group])
        _check_number("max_grad_norm", limit, 0, math.inf, "1 is usual, None clips nothing")
        if limit == 0:
            raise ValueError(
                "MuonClip: max_grad_norm: expected a positive number, got 0; 1 is usual, None "
                "clips nothing"
            )


def check_clip(limit: float | None, groups: list[dict[str, Any]]) -> None:
    """Raise for a `max_grad_norm` where no group is AdamW's: Muon ignores a gradient's scale."""
    if limit is not None and all(group["algorithm"] == "muon" for group in groups):
        raise ValueError(
            "MuonClip: max_grad_norm: expected None without a group of AdamW, since Muon does not "
            f"see the scale of a gradient, got {limit!r}; give it to the groups of AdamW alone"
        )


def _check_tensors(group: dict[str, Any]) -> None:
    """Numbers that lie on a device are for graphs, whose kernels read them there."""
    for key in ("lr", "weight_decay"):
        value = group[key]
        if isinstance(value, Tensor) and value.device.type != "cpu" and not group["capturable"]:
            raise ValueError(
                f"MuonClip: {key}: expected a number or a tensor on a CPU, got one on "
                f"{value.device}; pass capturable=True"
            )
    if group["capturable"] and isinstance(group["lr"], Tensor) and callable(group["adjust_lr_fn"]):
        raise ValueError(
            "MuonClip: adjust_lr_fn: expected a name beside capturable=True and a tensor as lr, "
            "got a callable, which would read it; use 'match_rms_adamw' or 'original'"
        )


def _check_number(key: str, value: Any, low: float, high: float, mend: str) -> None:
    """A finite number low <= value < high; a tensor on a device is not read."""
    if type(value) is float and low <= value < high:
        return
    wanted = f"a finite number >= {low}" + (f" and < {high}" if high < math.inf else "")
    if isinstance(value, Tensor) and key in _TENSORS:
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"MuonClip: {key}: expected {wanted}, or a tensor that holds one, got a tensor of "
                f"shape {tuple(value.shape)}, {value.dtype}; give each group one number"
            )
        if not engine.on_host(value):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"MuonClip: {key}: expected {wanted}, got {type(value).__name__} {value!r}; {mend}"
        )
    if not (math.isfinite(value) and low <= float(value) < high):
        raise ValueError(f"MuonClip: {key}: expected {wanted}, got {value}; {mend}")


def _check_muon(group: dict[str, Any]) -> None:
    if not callable(group["adjust_lr_fn"]) and group["adjust_lr_fn"] not in _ADJUST:
        raise ValueError(
            f"MuonClip: adjust_lr_fn: expected one of {_ADJUST} or a callable, got "
            f"{group['adjust_lr_fn']!r}; choose one"
        )
    for key in ("ns_dtype", "momentum_dtype"):
        dtype = group[key]
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not getattr(found, "is_floating_point", False):
            raise ValueError(
                f"MuonClip: {key}: expected a floating torch dtype or its name, got {dtype!r}; "
                "give 'float32' or 'bfloat16'"
            )
    check_options(**ns_options(group))
    _check.choice("MuonClip", "batch_dims", group["batch_dims"], get_args(BatchDims))
    if group["head_dim"] not in (0, 1):
        raise ValueError(
            f"MuonClip: head_dim: expected 0 (heads are rows) or 1 (columns), got "
            f"{group['head_dim']!r}; q and kv projections have 0, output projections 1"
        )
    if group["interleave"] is not None:
        _check.integer("MuonClip", "interleave", group["interleave"])
        if group["split_sizes"] is not None:
            raise ValueError(
                "MuonClip: interleave: expected none beside split_sizes "
                f"{tuple(group['split_sizes'])}, got {group['interleave']}; give one of them"
            )
    if group["ns_max_batch"] is not None:
        _check.between("MuonClip", "ns_max_batch", group["ns_max_batch"], 1, 1 << 40)
    for name, param in names(group):
        _check_matrices(name, param, group)


def _check_matrices(name: str, param: Tensor, group: dict[str, Any]) -> None:
    """The parameter can be cut into the matrices that the group asks for."""
    if param.ndim < 2:
        raise ValueError(
            f"MuonClip: parameter {name}: expected a matrix [..., rows, in], got shape "
            f'{tuple(param.shape)}; give it algorithm="adamw", as muon_param_groups(model) does'
        )
    shape = param.shape[-2:]
    if group["batch_dims"] == "flatten":
        shape = torch.Size((param.shape[0], param.shape[1:].numel()))
        if not is_flat(param):
            raise ValueError(
                f"MuonClip: batch_dims: 'flatten' needs a parameter without gaps, {name} has "
                f"strides {param.stride()}; make it contiguous"
            )
    size, side = shape[group["head_dim"]], ("rows", "columns")[group["head_dim"]]
    if group["num_heads"] is not None:
        heads = _check.integer("MuonClip", "num_heads", group["num_heads"])
        if heads < 1 or size % heads != 0:
            raise ValueError(
                f"MuonClip: num_heads: expected a divisor of the {size} {side} of {name}, got "
                f"{heads}; check the geometry"
            )
        size //= heads
    if (deal := group["interleave"]) is not None and (deal < 1 or size % deal != 0):
        raise ValueError(
            f"MuonClip: interleave: expected a divisor of the {size} {side} of {name}, got {deal}; "
            "2 for gate and up one by one"
        )
    sizes = group["split_sizes"]
    if sizes is not None and not (
        isinstance(sizes, Sequence)
        and not isinstance(sizes, str)
        and all(type(size) is int for size in sizes)
    ):
        raise TypeError(
            f"MuonClip: split_sizes: expected a sequence of ints, got {sizes!r}; give the {side} "
            "of each part"
        )
    if sizes is not None and (min(sizes, default=0) < 1 or sum(sizes) != size):
        raise ValueError(
            f"MuonClip: split_sizes: {tuple(sizes)} must be positive and add up to the {size} "
            f"{side} of {name}" + (" in a head" if group["num_heads"] is not None else "")
        )


def gradients_of(checked: Checked) -> list[Tensor | None]:
    """The gradients of a group's parameters; raises for those that `step` could not serve."""
    grads = [param.grad for param in checked.params]
    for grad in grads:
        if grad is not None and grad.layout is not torch.strided:
            raise TypeError(
                "MuonClip: gradient: expected a dense one, got a sparse one; use sparse=False"
            )
    if checked.sharded:
        for param in checked.params:
            check_gradient(param)
    return grads
