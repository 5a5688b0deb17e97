# SPDX-License-Identifier: MIT
"""What a backend does, at two heights.

Every rank calls the same functions in the same order. What differs between ranks that share their
memory and ranks that do not are the `Motions`: tokens go to their experts, results come home. Ranks
that share nothing move bytes, with a `Transport`; `wire.Records` makes motions of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


def capturing() -> bool:
    """Whether a CUDA graph is captured from what is launched now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Talk(Protocol):
    """The connection of one rank. Errors are `EPTimeout` and `EPRankLost`."""

    name: str  # of the backend
    rank: int
    world: int
    device: torch.device  # of the tensors

    def gather(self, message: Tensor) -> Tensor:
        """The messages of all ranks [P, n], on the host; `message` is int64 [n] on the device."""

    def close(self) -> None:
        """Give back what the connection holds. Twice is once."""


class Transport(Talk, Protocol):
    """A connection that moves bytes and knows nothing of tokens and experts."""

    def part(self, members: Sequence[int]) -> "Transport":
        """A connection of those ranks, this one among them, which all call this."""

    def start(
        self, buffer: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Send parts of `buffer` (uint8 [bytes], in the order of ranks, `sent[r]` bytes to rank r).

        The result waits and gives the parts that arrived, `received[r]` bytes from rank r. Nobody
        writes to `buffer` any more.
        """


class Leaving(Protocol):
    """Tokens on their way to the experts."""

    def ids(self) -> Tensor | None:
        """Wait; the ids [N, K] of the tokens that came and maybe of others, in the order of ranks.

        None where none were sent, or where records come by expert (expert_direct).
        """

    def finish(self, route: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """(tie, weights [N, K] or None, rows [R, *] of each part of a token).

        Differentiable in the weights and tokens; `tie` is an empty tensor that goes from motion to
        motion: a rank whose experts did nothing takes part in the backward all the same.
        """


class Motions(Protocol):
    """The two ways of rows between the ranks; the gradient of each is the other."""

    def away(
        self, op: str, route: Any, form: Any, back: Any, tokens: Sequence[Tensor],
        weights: Tensor | None, ids: Tensor | None,
    ) -> Leaving:  # fmt: skip
        """Send tokens [T, *] in `form`, their gradients in `back`, with weights and ids [T, K]."""

    def home(
        self, op: str, route: Any, form: Any, tie: Tensor, out: Tensor, here: Tensor | None,
        there: Tensor | None,
    ) -> Callable[[], Tensor]:  # fmt: skip
        """Add rows [R, H] up on their way home: with weights `here` [N, K] before they travel
        or `there` [T, K] when they have come. The result waits and gives the sums [T, H]."""
