# SPDX-License-Identifier: MIT
"""Two micro-batches side by side, as `forward_two` computes them: what is left to wait for.

A layer with experts has four parts: a attention, projections, the shared expert and the router;
d dispatch; e permute, experts and unpermute; c combine. Of batches A and B one computes while the
messages of the other travel; each waits for both:

    computes    a A | a B  | e A  | e B  | a A  | a B  | ...
    travels         | d A  | d B  | c A  | c B  | d A  | ...

So L layers take a + L (max(a, d) + max(e, d) + max(e, c)) + (L - 1) max(a, c) + c. The backward
goes from right to left, with its own times. What else a stage computes hides nothing.
"""

from collections.abc import Sequence

from kimi_ops.plan.layer import Piece

__all__ = ["pair_seconds"]

_PARTS = {"dispatch": "d", "combine": "c", "permute": "e", "experts": "e", "unpermute": "e"}


def pair_seconds(pieces: Sequence[Piece], layers: int, *, backward: bool = False) -> float:
    """Seconds of two micro-batches in one pass through so many layers of these pieces."""
    times = dict.fromkeys("adec", 0.0)
    for piece in pieces:
        times[_PARTS.get(piece.name, "a")] += piece.seconds
    a, d, e, c = times.values()
    if backward:
        d, c = c, d  # gradients of combined rows, which go as a dispatch, are the first to travel
    inside = max(a, d) + max(e, d) + max(e, c)
    return a + layers * inside + (layers - 1) * max(a, c) + c
