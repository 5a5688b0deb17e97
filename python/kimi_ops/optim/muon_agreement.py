# SPDX-License-Identifier: MIT
"""Ranks that share parameters compare, once, what they were given: where one differs all of them
raise, instead of waiting for messages of other sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from kimi_ops.optim.muon_blocks import names
from kimi_ops.optim.muon_circle import Circle

_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def agree(circles: Sequence[Circle], param_groups: list[dict[str, Any]]) -> None:
    """Raise on every rank of `circles`, the dimensions of a mesh, unless all ranks have the same
    parameters in the same groups with the same options."""
    lines = [line for group in param_groups for line in _lines(group)]
    if not circles or not lines:
        return
    ends = _ends([_digest("\n".join(lines)), len(lines)], circles)
    if ends[0][0] == ends[0][1]:
        return
    fewest, most = ends[1]
    if fewest != most:
        found = f"from {fewest} to {most} parameters"
    else:
        apart = _ends([_digest(line) for line in lines], circles)
        number = next(i for i, (low, high) in enumerate(apart) if low != high)
        found = f"other ones from parameter {number} of {most} on, which here is {lines[number]}"
    raise ValueError(
        f"MuonClip: params: expected the same groups on every rank, got {found}; build model and "
        "groups alike everywhere"
    )


def _lines(group: dict[str, Any]) -> list[str]:
    """A line for each parameter: all that the exchange or the update depends on."""
    options = {k: _text(v) for k, v in group.items() if k not in ("params", "param_names")}
    tail = ", ".join(f"{key}={options[key]}" for key in sorted(options))
    return [
        f"{name} {list(p.shape)} {p.dtype} {getattr(p, 'placements', '')} {tail}"
        for name, p in names(group)
    ]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return str([_text(item) for item in value])
    return str(value) if isinstance(value, _PLAIN) else type(value).__name__


def _digest(text: str) -> int:
    """56 bits, so that its negative fits in int64 too."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _ends(numbers: list[int], circles: Sequence[Circle]) -> list[tuple[int, int]]:
    """The smallest and the largest of each number over all ranks."""
    highest = torch.tensor([[-n, n] for n in numbers], dtype=torch.int64, device="cpu").flatten()
    for circle in circles:
        highest = circle.each(highest, "the comparison of parameters").amax(0)
    return [(-low, high) for low, high in highest.view(-1, 2).tolist()]
