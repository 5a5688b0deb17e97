# SPDX-License-Identifier: MIT
"""The keys of a group of MuonClip: which there are, and what schedulers do with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

# Of torch.optim.Adam and AdamW, with the values that say what MuonClip does (None: all).
TORCH_FLAGS: dict[str, Any] = {
    "amsgrad": False,
    "decoupled_weight_decay": True,
    "differentiable": False,
    "fused": None,
    "capturable": None,
}
# What schedulers and other tools keep in a group; MuonClip does not read it.
_GUESTS = (
    *("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"),
    *("name", "group_name", "lr_scale", "lr_mult"),
)
_MEANT = {"use_muon": "algorithm", "adam_eps": "adamw_eps", "beta": "betas", "wd": "weight_decay"}


def follow_cycle(group: dict[str, Any]) -> None:
    """Give a group of Muon the momentum that a scheduler cycles.

    ``OneCycleLR`` and ``CyclicLR`` write the first of ``betas`` in every group of an optimizer that
    has that key at all, and leave their bounds in ``max_momentum``. In a group of Muon the momentum
    is what they mean.
    """
    if group["algorithm"] == "muon" and "max_momentum" in group:
        group["momentum"] = group["betas"][0]


def check_keys(group: dict[str, Any], defaults: Iterable[str]) -> None:
    """Raise for a key that nobody reads, and for a flag of torch that asks for something else."""
    known = {"params", "param_names", *defaults, *_GUESTS}
    for key in group:
        if key in known or str(key).startswith("_"):
            continue
        if key in TORCH_FLAGS:
            if TORCH_FLAGS[key] not in (None, group[key]):
                raise ValueError(
                    f"MuonClip: {key}: expected {TORCH_FLAGS[key]}, got {group[key]!r}; MuonClip "
                    "has no other way, leave it out"
                )
            continue
        close = difflib.get_close_matches(str(key), sorted(known), 1, 0.6)
        meant = _MEANT.get(key, close[0] if close else None)
        raise TypeError(
            f"MuonClip: {key}: expected a key of a group, got one that nothing reads; "
            + (f"{meant!r} is meant?" if meant else "a key of your own starts with '_'")
        )
