# SPDX-License-Identifier: MIT
"""One more id for each sequence: penalties, then a draw among the likely ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Processor", "Sampling"]

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids [B, n], logits [B, V]) -> logits


def _error(name: str, expected: str, came: object, mend: str) -> ValueError:
    return ValueError(f"generate: {name}: expected {expected}, got {came}; {mend}")


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen: `KimiK2.generate` says what each number does."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    processors: Sequence[Processor] = ()
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise _error(
                "temperature",
                "at least 0 and finite",
                self.temperature,
                "1 samples from the model's own distribution",
            )
        if type(self.top_k) is not int or self.top_k < 0:
            raise _error("top_k", "an int >= 0", self.top_k, "use 0 for all")
        if not 0 < self.top_p <= 1:
            raise _error("top_p", "0 < top_p <= 1", self.top_p, "use 1 for all")
        if not 0 <= self.min_p <= 1:
            raise _error("min_p", "0 <= min_p <= 1", self.min_p, "use 0 for all")
        if not 0 < self.repetition_penalty < math.inf:
            raise _error(
                "repetition_penalty", "a number > 0", self.repetition_penalty, "1 changes nothing"
            )

    def choose(self, logits: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B] int64 from logits [B, V] behind ids [B, n], of which those that are `valid` count."""
        if self.repetition_penalty != 1:
            logits = self._penalised(logits, ids, valid)
        for processor in self.processors:
            logits = self._processed(processor, ids, logits)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, V] fp32, 0 where an id is not among the likely ones; rows add up to any number."""
        logits = logits.float() / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        found = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, ids = found.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)  # the first is always kept
            found = torch.zeros_like(ordered).scatter(-1, ids, ordered)
        if self.min_p:
            found = found.masked_fill(found < self.min_p * found.amax(-1, keepdim=True), 0.0)
        return found

    def _penalised(self, logits: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
        """Logits of ids that were there divided by the penalty, negative ones multiplied."""
        there = torch.zeros_like(logits, dtype=torch.int32)
        counts = torch.ones_like(ids, dtype=torch.int32) if valid is None else valid.int()
        there.scatter_add_(1, ids, counts)
        weaker = torch.where(
            logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
        )
        return torch.where(there > 0, weaker, logits)

    def _processed(self, processor: Processor, ids: Tensor, logits: Tensor) -> Tensor:
        result: Any = processor(ids, logits)
        if not isinstance(result, Tensor) or result.shape != logits.shape:
            came = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise _error(
                "logits_processor",
                f"logits {list(logits.shape)} from {processor}",
                came,
                "return a tensor like the one that was given",
            )
        return result
