# SPDX-License-Identifier: MIT
"""pytest's parametrize for what pytest-benchmark runs; nothing where pytest is missing."""

from collections.abc import Callable
from typing import Any

try:
    from pytest import mark

    parametrize: Callable[..., Any] = mark.parametrize
except ModuleNotFoundError:

    def parametrize(*_: object, **__: object) -> Callable[[Any], Any]:
        return lambda function: function
