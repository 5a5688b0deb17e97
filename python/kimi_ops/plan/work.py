# SPDX-License-Identifier: MIT
"""What is to be run, and one way of spreading it over the GPUs."""

from dataclasses import dataclass

from kimi_ops.plan.traffic import split

__all__ = ["Layout", "Loads", "Work"]

Loads = tuple[tuple[float, ...], ...]  # [layers, experts]


@dataclass(frozen=True)
class Work:
    """A step: training a batch in micro-batches, reading prompts, or a token more for sequences."""

    mode: str  # train | prefill | decode
    tokens: int  # of a rank in one micro-batch or step; where it decodes, its running sequences
    context: int  # tokens of a sequence; where it decodes, in the cache of each
    skew: float  # rows of the busiest rank by the mean; with loads, by what they say
    weights: str  # stored as bf16 | fp8 | int4
    wire: str  # of dispatched rows: bf16 | fp8; combined rows and gradients are bf16
    batch_tokens: int  # of a training step
    momentum_bytes: int = 4
    gradient_bytes: int = 4
    offload: bool = False  # the optimizer's state lies in the host's memory
    redundant: int = 0  # replicas of busy experts beside one of each
    loads: Loads | None = None  # tokens that each expert got
    overlap: bool = False  # it trains on micro-batches in twos, side by side

    @property
    def cached(self) -> int:
        """Tokens in the latent cache of a rank; a prompt may come in several steps."""
        return self.tokens * self.context if self.decoding else max(self.tokens, self.context)

    @property
    def predicted(self) -> int:
        """Tokens that need the head: of a prompt only the last."""
        return -(-self.tokens // self.context) if self.mode == "prefill" else self.tokens

    @property
    def training(self) -> bool:
        return self.mode == "train"

    @property
    def at_once(self) -> int:
        """Micro-batches that go through a stage together."""
        return 2 if self.overlap else 1

    @property
    def items(self) -> str:
        """What `tokens` counts."""
        return f"sequences of {self.context:,}" if self.decoding else "tokens"

    @property
    def decoding(self) -> bool:
        return self.mode == "decode"

    def slots(self, experts: int) -> int:
        """Experts with their replicas, which ranks share."""
        return experts + self.redundant

    def row_bytes(self, hidden: int) -> float:
        """A dispatched row; FP8 has an fp32 scale for 128 values."""
        return hidden * (2.0 if self.wire == "bf16" else 1 + 4 / 128)


@dataclass(frozen=True)
class Layout:
    """GPUs = pp stages x dp ranks; groups of ep ranks share a stage's experts."""

    ep: int
    pp: int
    dp: int
    recompute: str = "none"

    @property
    def replicas(self) -> int:
        """Copies of each expert: ranks that average its gradient, or instances that serve."""
        return self.dp // self.ep

    def stages(self, layers: int) -> list[range]:
        """Consecutive layers of each stage.

        Where they do not divide, the last stage, which has the head, gets fewer; then those from
        the first on, which keep the most micro-batches.
        """
        filled = [*range(self.pp - 2, -1, -1), self.pp - 1]
        by_stage = dict(zip(filled, split(layers, self.pp), strict=True))  # larger ones first
        starts = [sum(by_stage[n] for n in range(stage)) for stage in range(self.pp)]
        return [range(start, start + by_stage[n]) for n, start in enumerate(starts)]

    def micro_batches(self, work: Work) -> int:
        """Of a step on each rank."""
        return max(1, -(-work.batch_tokens // (self.dp * work.tokens)))

    def turns(self, work: Work) -> int:
        """Of micro-batches that go through the stages together, the last ones in part empty."""
        return -(-self.micro_batches(work) // work.at_once)
