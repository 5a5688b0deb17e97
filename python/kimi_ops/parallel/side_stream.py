# SPDX-License-Identifier: MIT
"""Kernels of an exchange on a stream of their own, beside what the caller's stream does."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def beside(
    side: torch.cuda.Stream, begin: Callable[[], Callable[[], Result]]
) -> Callable[[], Result]:
    """What `begin` gives, its kernels on `side`, behind what the current stream has so far.

    The result makes the stream that is current then wait. The host waits for nothing, and a graph
    can hold both.

    No memory is used too early. What `begin` reads stays alive until the result is asked for. What
    it makes is `side`'s, and `side` uses it again in a later call at most, behind all that the
    current stream has done with it until then.
    """
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        wait = begin()
        done = side.record_event()

    def arrived(_read: object = begin) -> Result:
        torch.cuda.current_stream(side.device).wait_event(done)
        return wait()

    return arrived
