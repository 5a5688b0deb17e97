# SPDX-License-Identifier: MIT
"""Checks of arguments that know no framework: ``op: argument: expected, got, how to mend it``."""

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any


def shape(op: str, name: str, value: Any, expected: Sequence[int | str], mend: str = "") -> None:
    """`expected` holds sizes, or letters for sizes that may be anything."""
    if not hasattr(value, "shape"):
        raise TypeError(f"{op}: {name}: expected an array, got {type(value).__name__}; make it one")
    fits = len(value.shape) == len(expected) and all(
        isinstance(want, str) or got == want
        for got, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(str(want) for want in expected) + "]"
        hint = f"; {mend}" if mend else ""
        raise ValueError(f"{op}: {name}: expected shape {wanted}, got {list(value.shape)}{hint}")


def choice(op: str, name: str, value: Any, expected: Sequence[str]) -> None:
    if value not in expected:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(expected)}, got {value!r}")


def integer(op: str, name: str, value: Any) -> Any:
    """`value` as an int; NumPy's integers count, bool and float do not."""
    if type(value) is int or _symbolic(value, "SymInt"):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{op}: {name}: expected an int, got {type(value).__name__}; pass int({name})"
        )
    return operator.index(value)


def number(op: str, name: str, value: Any) -> Any:
    known = isinstance(value, (int, float)) or _symbolic(value, "SymInt", "SymFloat")
    if not known or isinstance(value, bool):
        raise TypeError(f"{op}: {name}: expected a number, got {type(value).__name__}")
    if isinstance(value, float) and not -math.inf < value < math.inf:  # compilers read this one
        raise ValueError(
            f"{op}: {name}: expected a finite number, got {value}; check where it comes from"
        )
    return value


def between(op: str, name: str, value: Any, low: int, high: int, why: str = "") -> None:
    value = integer(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name}: expected {low}..{high}{why}, got {value}")


def _symbolic(value: Any, *names: str) -> bool:
    """Whether torch traces `value`: a number that it does not know yet."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, tuple(getattr(torch, name) for name in names))
