# SPDX-License-Identifier: MIT
"""Argument checks shared by the ops on tensors: ``op: argument: expected, got, how to mend it``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops._arguments import between as between
from kimi_ops._arguments import choice as choice
from kimi_ops._arguments import integer as integer
from kimi_ops._arguments import number as number
from kimi_ops._arguments import shape as shape


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


def same_device(op: str, name: str, value: Tensor, like: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name}: expected on {other.device} as {like}, got {value.device}; "
            f"move it with .to({like}.device)"
        )
