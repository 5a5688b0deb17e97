# SPDX-License-Identifier: MIT
"""The checks of a group of MuonClip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.optim.muon_blocks import names, ns_options
from kimi_ops.optim.newton_schulz import check_options

_ADJUST = (None, "original", "match_rms_adamw")
ALGORITHMS = ("muon", "adamw")


def check_group(group: dict[str, Any]) -> None:
    """Raise for a group that ``step`` could not serve."""
    _check.choice("MuonClip", "algorithm", group["algorithm"], ALGORITHMS)
    _check_tensors(group)
    for key in ("lr", "weight_decay", "momentum", "eps", "adamw_eps"):
        if not float(group[key]) >= 0:
            raise ValueError(f"MuonClip: {key}: expected a number >= 0, got {group[key]}; raise it")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(
            f"MuonClip: betas: expected two numbers in [0, 1), got {group['betas']}; "
            "AdamW's habit is (0.9, 0.95)"
        )
    limit = group["max_grad_norm"]
    if limit is not None and not float(limit) > 0:
        raise ValueError(
            f"MuonClip: max_grad_norm: expected a positive number or None, got {limit}; 1 is usual"
        )
    for name, param in names(group):
        if not param.is_floating_point() or param.layout != torch.strided:
            raise TypeError(
                f"MuonClip: parameter {name}: expected a dense real floating-point tensor, got "
                f"{param.dtype}, {param.layout}; convert it"
            )
    if group["algorithm"] == "muon":
        _check_muon(group)


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


def _check_muon(group: dict[str, Any]) -> None:
    if not group["momentum"] < 1:
        raise ValueError(
            f"MuonClip: momentum: expected a number below 1, got {group['momentum']}; 0.95 is usual"
        )
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
    _check.choice("MuonClip", "batch_dims", group["batch_dims"], ("leading", "flatten"))
    if group["head_dim"] not in (0, 1):
        raise ValueError(
            f"MuonClip: head_dim: expected 0 (heads are rows) or 1 (columns), got "
            f"{group['head_dim']!r}; q and kv projections have 0, output projections 1"
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
            f'{tuple(param.shape)}; give it algorithm="adamw"'
        )
    shape = param.shape[-2:]
    if group["batch_dims"] == "flatten":
        shape = torch.Size((param.shape[0], param.shape[1:].numel()))
        if not param.is_contiguous():
            raise ValueError(
                f"MuonClip: batch_dims: 'flatten' needs a contiguous parameter, {name} has strides "
                f"{param.stride()}; make it contiguous"
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
    sizes = group["split_sizes"]
    if sizes is not None and (min(sizes, default=0) < 1 or sum(sizes) != size):
        raise ValueError(
            f"MuonClip: split_sizes: {tuple(sizes)} must be positive and add up to the {size} "
            f"{side} of {name}" + (" in a head" if group["num_heads"] is not None else "")
        )
