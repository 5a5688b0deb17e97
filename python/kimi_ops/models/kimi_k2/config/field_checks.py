# SPDX-License-Identifier: MIT
"""What the numbers of a configuration must be, said in one way."""

import math
from typing import Any


def error(
    field: str, expected: str, came: object, mend: str, op: str = "KimiK2Config"
) -> ValueError:
    return ValueError(f"{op}: {field}: expected {expected}, got {came!r}; {mend}")


def check_int(field: str, value: object, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"KimiK2Config: {field}: expected an int{alternative}, got {type(value).__name__}; "
            "pass a number"
        )
    if value < 1:
        raise error(field, f"at least 1{alternative}", value, "raise it")


def check_number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"KimiK2Config: {field}: expected a number, got {type(value).__name__}; pass a number"
        )
    if not math.isfinite(value):
        raise error(field, "a finite number", value, "correct it")


def check_tokens(
    field: str, value: object, vocab_size: int, *, several: bool = False, op: str = "KimiK2Config"
) -> None:
    """None, or an id of the vocabulary, or where `several` may be a list of them."""
    if value is None:
        return
    ids: list[Any] = [*value] if several and isinstance(value, list | tuple) else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
        kind = "an int, a list of int" if several else "an int"
        raise TypeError(f"{op}: {field}: expected {kind} or None, got {value!r}; pass token ids")
    if not all(0 <= each < vocab_size for each in ids):
        raise error(
            field,
            f"ids in 0 .. {vocab_size - 1}, the vocabulary",
            value,
            "pass ids of it, or None",
            op,
        )
