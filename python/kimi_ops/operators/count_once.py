# SPDX-License-Identifier: MIT
"""Counting in a forward that activation checkpointing repeats inside a backward."""

import torch
from torch import Tensor


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing repeats it there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def seen_by_a_graph() -> bool:
    """Whether a compiler or a transform of torch.func runs this: counting has to be an operator."""
    transforms = torch._C._functorch.peek_interpreter_stack()
    return torch.compiler.is_compiling() or transforms is not None


@torch.library.custom_op("kimi_ops::count_once_", mutates_args={"total"})
def count_once_(total: Tensor, counts: Tensor) -> None:
    """total += counts, unless the forward repeats another; a compiled graph asks when it runs."""
    if not recomputing():
        total += counts
