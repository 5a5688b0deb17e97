# SPDX-License-Identifier: MIT
"""What the numbers of a configuration must be, said in one way."""

import math


def error(field: str, expected: str, came: object, mend: str) -> ValueError:
    return ValueError(f"KimiK2Config: {field}: expected {expected}, got {came!r}; {mend}")


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
