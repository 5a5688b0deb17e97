# SPDX-License-Identifier: MIT
"""Settings say what is wrong with them when they are made, not an hour later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["at_least", "positive"]


def at_least(settings: Any, least: Mapping[str, float]) -> None:
    """Refuse values of a dataclass that are too small.

    Parameters
    ----------
    settings : dataclass
    least : mapping
        Of field names; where the least is an int the value has to be one.

    Raises
    ------
    ValueError
        What was expected, what came, and the default.

    Examples
    --------
    >>> from kimi_ops.agentic.rl import RlSettings
    >>> RlSettings(tries=1)
    Traceback (most recent call last):
        ...
    ValueError: RlSettings: tries: expected an int of at least 2, got 1; the default is 6
    """
    for name, low in least.items():
        value = getattr(settings, name)
        whole = isinstance(low, int)
        if whole and not isinstance(value, int) or not low <= value < math.inf:
            _refuse(settings, name, f"{'an int' if whole else 'a number'} of at least {low}")


def positive(settings: Any, *names: str) -> None:
    """Refuse values of a dataclass that are not above 0; of a tuple, any of them.

    Raises
    ------
    ValueError
        What was expected, what came, and the default.
    """
    for name in names:
        value = getattr(settings, name)
        some = value if isinstance(value, tuple) else (value,)
        if not all(0 < one < math.inf for one in some):
            _refuse(settings, name, "numbers above 0" if len(some) > 1 else "a number above 0")


def _refuse(settings: Any, name: str, expected: str) -> None:
    default = next(one.default for one in dataclasses.fields(settings) if one.name == name)
    raise ValueError(
        f"{type(settings).__name__}: {name}: expected {expected}, got {getattr(settings, name)}; "
        f"the default is {default}"
    )
