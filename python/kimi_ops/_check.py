# SPDX-License-Identifier: MIT
"""Argument checks shared by the ops: ``op: argument: expected, got, how to mend it``."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")


def dtype(
    op: str, name: str, value: Tensor, expected: Sequence[torch.dtype], mend: str = ""
) -> None:
    if value.dtype not in expected:
        names = ", ".join(str(d).removeprefix("torch.") for d in expected)
        got = str(value.dtype).removeprefix("torch.")
        cast = str(expected[0]).removeprefix("torch.")
        mend = mend or f"cast it with .to(torch.{cast})"
        raise TypeError(f"{op}: {name}: expected {names}, got {got}; {mend}")


def shape(op: str, name: str, value: Tensor, expected: Sequence[int | str], mend: str = "") -> None:
    """`expected` holds sizes, or letters for sizes that may be anything."""
    fits = value.dim() == len(expected) and all(
        isinstance(want, str) or got == want
        for got, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(str(want) for want in expected) + "]"
        hint = f"; {mend}" if mend else ""
        raise ValueError(f"{op}: {name}: expected shape {wanted}, got {list(value.shape)}{hint}")


def same_device(op: str, name: str, value: Tensor, like: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name}: expected on {other.device} as {like}, got {value.device}; "
            f"move it with .to({like}.device)"
        )


def choice(op: str, name: str, value: Any, expected: Sequence[str]) -> None:
    if value not in expected:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(expected)}, got {value!r}")


def integer(op: str, name: str, value: Any) -> Any:
    """`value` as an int; NumPy's integers count, bool and float do not."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{op}: {name}: expected an int, got {type(value).__name__}; pass int({name})"
        )
    return operator.index(value)


def number(op: str, name: str, value: Any) -> Any:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name}: expected a number, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{op}: {name}: expected a finite number, got {value}; check where it comes from"
        )
    return value


def between(op: str, name: str, value: Any, low: int, high: int, why: str = "") -> None:
    value = integer(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name}: expected {low}..{high}{why}, got {value}")
