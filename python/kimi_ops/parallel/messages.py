# SPDX-License-Identifier: MIT
"""What ranks tell each other before rows move: numbers and short texts, as int64 words.

An argument that one rank refuses is told to all, so that none waits for a rank that raised.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.parallel.errors import EPMismatch, EPPeerError, named, number

_TEXT = 256  # words of a text: 2048 bytes


def text(value: Any) -> Tensor:
    """[_TEXT] int64 that `texts` reads."""
    data = json.dumps(value, ensure_ascii=False).encode()
    return torch.frombuffer(bytearray(data.ljust(8 * _TEXT)), dtype=torch.int64)


def short(fault: Exception | None) -> str | None:
    """The text of an exception, as much as fits a `text`."""
    return None if fault is None else str(fault)[:400]


def texts(words: Tensor) -> list[Any]:
    """The values of words [P, _TEXT]."""
    return [json.loads(bytes(row.contiguous().view(torch.uint8).tolist())) for row in words]


def raise_faults(op: str, faults: Sequence[str | None]) -> None:
    """Raise what other ranks have refused; `faults` has a text or None for each rank."""
    if bad := [rank for rank, fault in enumerate(faults) if fault is not None]:
        told = "; ".join(f"rank {number(rank)}: {faults[rank]}" for rank in bad)
        raise EPPeerError(f"{op}: {named(bad)} refused the arguments: {told}", bad)


def agree(op: str, name: str, values: Sequence[Any]) -> None:
    """Raise `EPMismatch`, with the same text on every rank, unless all ranks have one value."""
    if any(value != values[0] for value in values):
        told = ", ".join(f"rank {number(rank)} has {value}" for rank, value in enumerate(values))
        raise EPMismatch(
            f"{op}: {name}: expected the same on every rank; {told}", range(len(values))
        )
