# SPDX-License-Identifier: MIT
"""What MuonClip makes of a saved state, and of functions that travel in one."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_ops.optim.group_keys import TORCH_FLAGS, check_keys
from kimi_ops.optim.muon_blocks import names, state_dtype
from kimi_ops.optim.muon_masters import MASTER
from kimi_ops.optim.muon_shards import Shards

FUNCTION = "a function, which is not saved"  # stands for one in a state dict


class _Unread:
    """A tensor that ``torch.optim.Optimizer.load_state_dict`` passes on as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def wrap_state(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook before loading that keeps tensors from being cast; `loaded_state` unwraps them."""

    def wrapped(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        return {k: _Unread(v) if isinstance(v, Tensor) else v for k, v in entry.items()}

    state = {key: wrapped(entry) for key, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}


def loaded_state(
    state: dict[Any, Any], groups: list[dict[str, Any]], shards: Shards
) -> dict[Any, Any]:
    """The state that this rank keeps, in the dtypes it is computed in; tensors are copies where
    they were wrapped."""
    kept = defaultdict(dict, state)
    for group in groups:
        for name, param in names(group):
            if param not in kept:
                continue
            if not shards.mine(param):
                del kept[param]
                continue
            kept[param] = {
                key: _loaded(value.tensor, key, name, param, group, shards)
                if isinstance(value, _Unread)
                else value
                for key, value in kept[param].items()
            }
    return kept


def _loaded(
    value: Tensor, key: str, name: str, param: Tensor, group: dict[str, Any], shards: Shards
) -> Tensor:
    if key == "step":
        return value.clone()
    dtype = torch.float32 if key == MASTER else state_dtype(param, group)
    value = value.to(param.device, dtype, copy=True)
    if value.shape == param.shape:
        return shards.local(param, value)
    if shards.process_group is None:
        raise ValueError(
            f"MuonClip: load_state_dict: {key} of {name}: expected shape {tuple(param.shape)}, got "
            f"{tuple(value.shape)}; load the state of this model"
        )
    return value


def loaded_group(
    group: dict[str, Any], old: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """A saved group with the keys of MuonClip: what torch.optim.Muon or AdamW did not save stays
    as it is in the optimizer that loads."""
    check_keys(group, defaults)
    dropped = TORCH_FLAGS.keys() - defaults.keys()
    group = {key: value for key, value in group.items() if key not in dropped}
    algorithm = group.get("algorithm", old["algorithm"])
    if algorithm == "adamw" and "adamw_eps" not in group and "eps" in group:
        group["adamw_eps"] = group["eps"]
    if group.get("adjust_lr_fn") == FUNCTION:
        if not callable(old["adjust_lr_fn"]):
            raise ValueError(
                "MuonClip: load_state_dict: adjust_lr_fn: the state was saved by an optimizer with "
                "a function, which is not saved; give this one the function before it loads"
            )
        group["adjust_lr_fn"] = old["adjust_lr_fn"]
    return {key: old.get(key, value) for key, value in defaults.items()} | group


# ---- functions in a copy of an optimizer


class _Packed:
    """A function on its way through a copy: pickle finds it by its name, or says why not."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickle.dumps(self.function)
        except Exception as error:
            raise TypeError(
                "MuonClip: adjust_lr_fn: expected a function that pickle finds by its name, got "
                f"{self.function!r}; define it at the top of a module, or save state_dict()"
            ) from error
        return _Packed, (self.function,)


def pack_function(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a group (or of the defaults) whose function can be copied and pickled."""
    function = group["adjust_lr_fn"]
    return {**group, "adjust_lr_fn": _Packed(function) if callable(function) else function}


def unpack_function(group: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`pack_function`."""
    packed = group.get("adjust_lr_fn")
    return {**group, "adjust_lr_fn": packed.function} if isinstance(packed, _Packed) else group
