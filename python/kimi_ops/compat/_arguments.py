# SPDX-License-Identifier: MIT
"""Arguments of other libraries' functions that have one value here."""

from typing import Any

from torch import Tensor


def only(op: str, name: str, value: Any, served: Any, mend: str) -> None:
    """Refuse any value but the one that is served."""
    if value is served or (not isinstance(value, Tensor) and value == served):
        return
    got = type(value).__name__ if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"{op}: {name}: expected {served!r}, got {got}, which is not served; {mend}")
