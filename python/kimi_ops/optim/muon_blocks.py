# SPDX-License-Identifier: MIT
"""The matrices inside a parameter of a Muon group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.choices import Method
from kimi_ops.optim.ns_schedule import ns_flops

_ADAMW_FLOPS = 64  # what an element's passes through memory cost, in operations of a product


def blocks(x: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """The matrices of x that the group orthogonalises on their own, each [..., m, n], as views.

    ``batch_dims="flatten"`` first makes x a matrix [first, rest], the rest in the order of memory;
    ``num_heads`` cuts the axis ``head_dim`` (0 rows, 1 columns) into heads, a new batch dimension;
    ``split_sizes`` cuts the same axis of what is left into runs, ``interleave`` deals it out one by
    one; ``transposed`` makes [in, rows] [rows, in] in the end.
    """
    if group["batch_dims"] == "flatten":
        x = x.permute(0, *_trailing(x)).flatten(1)
    axis = group["head_dim"] - 2
    if group["num_heads"] is not None:
        x = x.unflatten(axis, (group["num_heads"], -1))
        if axis == -1:
            x = x.movedim(-2, -3)
    parts = [x]
    if group["split_sizes"] is not None:
        parts = list(x.split(list(group["split_sizes"]), axis))
    elif group["interleave"] is not None:
        parts = list(x.unflatten(axis, (-1, group["interleave"])).unbind(axis))
    return [part.mT for part in parts] if group["transposed"] else parts


def _trailing(x: Tensor) -> list[int]:
    """Dimensions 1 and up, the slowest in memory first: channels last are last."""
    return sorted(range(1, x.ndim), key=x.stride().__getitem__, reverse=True)


def is_flat(x: Tensor) -> bool:
    """Whether ``batch_dims="flatten"`` sees x as a matrix where it lies."""
    dims = [dim for dim in _trailing(x) if x.shape[dim] > 1]
    pairs = zip(dims, dims[1:], strict=False)
    return all(x.stride(slow) == x.stride(fast) * x.shape[fast] for slow, fast in pairs)


def aligned(updates: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The updates in the order of memory of their parameters, so that `blocks` cuts both alike."""
    return [
        u if p.ndim < 3 or u.stride() == p.stride() else torch.empty_like(p, dtype=u.dtype).copy_(u)
        for u, p in zip(updates, params, strict=True)
    ]


def ns_options(group: dict[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`kimi_ops.newton_schulz` for a group."""
    return {
        "steps": group["ns_steps"],
        "coefficients": group["ns_coefficients"],
        "method": group["ns_method"],
        "dtype": as_dtype(group["ns_dtype"]),
        "restarts": group["ns_restarts"],
        "eps": group["eps"],
    }


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, also by its name."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def state_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    """Of the momentum and the AdamW moments: fp32 or wider unless ``momentum_dtype`` says else."""
    chosen = as_dtype(group["momentum_dtype"]) if group["algorithm"] == "muon" else None
    return chosen or (torch.float64 if param.dtype == torch.float64 else torch.float32)


def cost(shape: torch.Size, group: dict[str, Any]) -> int:
    """Operations of one update, by which ranks share the work."""
    if group["algorithm"] == "adamw":
        return _ADAMW_FLOPS * shape.numel()
    example = torch.empty(shape, device="meta")
    method: Method = "gram" if group["ns_method"] == "gram" else "symmetric"
    return sum(
        ns_flops(block.shape, group["ns_steps"], method, restarts=min(1, group["ns_steps"] - 1))
        for block in blocks(example, group)
    )


def names(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters with their names, or their numbers where they have none."""
    params = group["params"]
    given = group.get("param_names") or [f"#{i}" for i in range(len(params))]
    return zip(given, params, strict=True)


def summary(groups: Sequence[dict[str, Any]]) -> str:
    """One line for each group, then each parameter."""
    lines = []
    for group in groups:
        params = group["params"]
        side = ("rows", "columns")[group["head_dim"]]
        how = f", {side} of {group['num_heads']} heads" if group["num_heads"] else ""
        how += f", {side} split {tuple(group['split_sizes'])}" if group["split_sizes"] else ""
        how += f", {side} dealt out to {group['interleave']}" if group["interleave"] else ""
        how += ", transposed" if group["transposed"] else ""
        count = sum(p.numel() for p in params)
        lines.append(f"{group['algorithm']:<6} {len(params)} tensors, {count} parameters{how}")
        lines += [f"  {name} {list(p.shape)}" for name, p in names(group)]
    return "\n".join(lines)
