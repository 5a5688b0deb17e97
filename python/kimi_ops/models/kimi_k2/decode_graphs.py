# SPDX-License-Identifier: MIT
"""Steps of one token a sequence as CUDA graphs: the host launches one thing, not a hundred.

A graph repeats the same kernels on the same memory, so nothing in it may depend on a number of the
host. Where the new token goes is a tensor; a step attends over a window of the cache, a power of
two, in which columns that hold nothing yet are masked. Each window has a graph, made when it is
first needed: 10 for the whole context of K2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.attention import LatentCache
from kimi_ops.models.kimi_k2.decoder import Decoder

__all__ = ["CudaGraphs", "DecodeGraphs"]

_SMALLEST = 256  # tokens of a window


class OneToken(LatentCache):
    """The first `window` tokens of a cache, as a step sees them that adds one at `place`."""

    def __init__(self, cache: LatentCache, window: int, place: Tensor) -> None:
        self.entries, self.length = cache.entries[:, :, :window], 1  # more than none
        self.entries[:, :, cache.length :].zero_()  # masked: weighed by 0, and 0 NaN is NaN
        self._place = place  # [1] int64
        self._columns = torch.arange(window, device=place.device)
        # where there is no padding yet there will be none: only a prompt brings it
        self._padding = None if cache.documents is None else cache.documents[:, :window]

    def write(self, layer: int, entry: Tensor) -> Tensor:
        self.entries[layer].index_copy_(1, self._place, entry)
        return self.entries[layer]

    def see(self, documents: Tensor | None, tokens: int) -> Tensor:
        there = (self._columns <= self._place)[None]
        return there if self._padding is None else there & (self._padding >= 0)

    def seen(self, documents: Tensor | None, start: int, end: int) -> Tensor:
        assert documents is not None
        return documents[:, None].expand(self.entries.shape[1], 1, -1)


class DecodeGraphs:
    """The steps of a model over one cache.

    Parameters
    ----------
    model : KimiK2
        In eval mode, all of it on one device; a step reads the weights where they lie.
    cache : LatentCache
        Filled by a prompt, with its padding. Nothing but `step` adds to it from now on.
    capture : callable
        Makes something that repeats what a function launched, and gives the tensor that it gave.
    """

    def __init__(
        self,
        model: Decoder,
        cache: LatentCache,
        capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]],
    ) -> None:
        device = model.lm_head.weight.device
        self._model, self._cache = model, cache
        batch = cache.entries.shape[1]
        self._ids, self._positions = torch.zeros(2, batch, 1, dtype=torch.int64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._steps: dict[int, Callable[[], Tensor]] = {}
        self._capture = capture

    def step(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, V] behind ids [B, 1] at rotary `positions` [B, 1]; the cache has them then."""
        cache = self._cache
        cache.check(len(ids), 1, self._model.lm_head.weight)
        self._ids.copy_(ids)
        self._place.fill_(cache.length)
        self._positions.copy_(self._place if positions is None else positions)
        window = min(cache.capacity, max(_SMALLEST, 1 << cache.length.bit_length()))
        if window not in self._steps:
            one = OneToken(cache, window, self._place)
            self._steps[window] = self._capture(lambda: self._forward(one))
        cache.length += 1
        return self._steps[window]().clone()

    @torch.no_grad()
    def _forward(self, one: OneToken) -> Tensor:
        one.length = 1
        logits: Tensor = self._model(self._ids, position_ids=self._positions, cache=one)[:, -1]
        return logits


class CudaGraphs:
    """Captures; all graphs share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # once as it is: libraries take their memory and load their kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
