# SPDX-License-Identifier: MIT
"""What a forward gives beside logits: the loss, hidden states, the routers' logits."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.models.kimi_k2.moe import MoE

__all__ = ["KimiK2Output", "check_labels", "next_token_loss", "recorded"]


class KimiK2Output(NamedTuple):
    """`Decoder.forward`, where more than logits are asked for; what was not asked for is None."""

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


def check_labels(labels: Tensor, shape: tuple[int, int], logits_to_keep: int) -> None:
    if labels.dtype != torch.int64 or tuple(labels.shape) != shape:
        raise ValueError(
            f"KimiK2: labels: expected int64 {list(shape)}, got {labels.dtype} "
            f"{list(labels.shape)}; pass the ids, -100 where no loss is wanted"
        )
    if logits_to_keep:
        raise ValueError(
            f"KimiK2: logits_to_keep: expected 0 beside labels, got {logits_to_keep}; a loss needs "
            "all logits"
        )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labels one place further on, fp32; -100 counts for none."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


@contextmanager
def recorded(layers: Sequence[MoE]) -> Iterator[list[Tensor]]:
    """The logits that the routers of `layers` compute inside the block."""
    found: list[Tensor] = []

    def keep(_: Any, __: Any, output: tuple[Tensor, Any]) -> None:
        found.append(output[0])

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.gate.register_forward_hook(keep).remove)
        yield found
