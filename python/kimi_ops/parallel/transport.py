# SPDX-License-Identifier: MIT
"""What a backend does: it moves bytes between ranks and knows nothing of tokens and experts.

Every rank calls the same functions in the same order. Two kinds of traffic make a dispatch, one a
combine: a small message that everybody reads (`gather`), and one buffer of packed records for
each direction (`start`, whose result is waited for when it is needed).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Transport(Protocol):
    """The connection of one rank. Errors are `EPTimeout` and `EPRankLost`."""

    name: str  # of the backend
    rank: int
    world: int
    device: torch.device  # of the buffers

    def gather(self, message: Tensor) -> Tensor:
        """The messages of all ranks [P, n], on the host; `message` is int64 [n] on the device."""

    def start(
        self, buffer: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Send parts of `buffer` (uint8 [bytes], in the order of ranks, `sent[r]` bytes to rank r).

        The result waits and gives the parts that arrived, `received[r]` bytes from rank r. Nobody
        writes to `buffer` any more.
        """

    def close(self) -> None:
        """Give back what the connection holds. Twice is once."""
