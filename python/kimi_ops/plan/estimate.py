# SPDX-License-Identifier: MIT
"""A whole step in one layout: the slowest stage, the pipeline's bubble, the optimizer."""

from dataclasses import dataclass, replace
from itertools import chain

from kimi_ops.optim.ns_schedule import ns_flops
from kimi_ops.plan.counts import Counts
from kimi_ops.plan.hardware import Hardware
from kimi_ops.plan.layer import COMMUNICATION, Piece, again, dense_layer, merged, moe_layer
from kimi_ops.plan.memory import Memory, memory
from kimi_ops.plan.pairs import pair_seconds
from kimi_ops.plan.skew import busiest
from kimi_ops.plan.work import Layout, Work

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one layout; every one computed, no one measured on this machine."""

    layout: Layout
    skew: float  # rows of the busiest rank by the mean
    memory: Memory
    capacity: float  # bytes of a GPU
    host_capacity: float
    layer: list[Piece]  # of a layer with experts: training forward, backward and what is repeated
    stage_seconds: float  # a micro-batch in the slowest stage; of two side by side the half
    stage_overlapped: (
        float  # the same with dispatch and combine behind the rest, or the rest behind
    )
    micro_batches: int
    bubble: float  # share of the step
    outside: dict[str, float]  # seconds a step: gradients, optimizer, host
    seconds: float
    overlapped: float
    tokens: int  # of all GPUs in a step; the last micro-batches may be in part empty
    gpus: int

    @property
    def fits(self) -> bool:
        return self.missing <= 0

    @property
    def missing(self) -> float:
        """Bytes a GPU lacks, or its share of the host; negative where some are left."""
        return max(self.memory.total - self.capacity, self.memory.host - self.host_capacity)

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds / self.gpus

    @property
    def bound(self) -> str:
        """What the pieces of the layer wait for most: tensor, memory, NVLink or network."""
        waits: dict[str, float] = {}
        for piece in self.layer:
            waits[piece.bound] = waits.get(piece.bound, 0.0) + piece.seconds
        return max(waits, key=lambda bound: waits[bound])

    def piece(self, name: str) -> Piece:
        return next(p for p in self.layer if p.name == name)


def _split(pieces: list[Piece]) -> tuple[float, float]:
    """Seconds of all pieces, and of those that communicate."""
    sending = sum(p.seconds for p in pieces if p.name in COMMUNICATION)
    return sum(p.seconds for p in pieces), sending


def estimate(hardware: Hardware, counts: Counts, work: Work, layout: Layout) -> Estimate:
    """What a step of `work` takes in `layout`."""
    config = counts.config
    work = replace(work, skew=busiest(config, work, layout.ep, hardware.domain))
    gpus = layout.pp * layout.dp
    kinds = {
        sparse: _passes(hardware, counts, work, layout, sparse)
        for sparse in {config.is_moe_layer(n) for n in range(config.num_hidden_layers)}
    }
    times = [
        _stage(hardware, counts, work, layout, kinds, s) for s in layout.stages(_depth(counts))
    ]
    stage, overlapped = (max(t[n] for t in times) for n in (0, 1))
    outside = _outside(hardware, counts, work, layout) if work.training else {}
    count = layout.micro_batches(work) if work.training else 1
    turns = (layout.turns(work) if work.training else 1) + layout.pp - 1
    slots = work.at_once * turns
    after = sum(outside.values())
    return Estimate(
        layout,
        work.skew,
        memory(counts, work, layout),
        hardware.memory,
        hardware.host_memory,
        merged(chain(*kinds[True in kinds])),
        stage,
        overlapped,
        count,
        (layout.pp - 1) / turns,
        outside,
        slots * stage + after,
        slots * overlapped + after,
        work.batch_tokens if work.training else layout.dp * work.tokens,
        gpus,
    )


def _passes(
    hardware: Hardware, counts: Counts, work: Work, layout: Layout, sparse: bool
) -> list[list[Piece]]:
    """The pieces of a layer: forward; where it trains what is repeated, and the backward."""

    def made(backward: bool) -> list[Piece]:
        if not sparse:
            return dense_layer(hardware, counts, work, backward=backward)
        gpus = layout.pp * layout.dp
        return moe_layer(hardware, counts, work, layout.ep, backward=backward, gpus=gpus)

    forward = made(False)
    if not work.training:
        return [forward]
    return [forward, again(hardware, counts, work, forward, layout.recompute), made(True)]


def _side_by_side(passes: list[list[Piece]], layers: int) -> float:
    """Seconds of two micro-batches in so many layers with experts."""
    forward, repeated, backward = passes
    backward = [*repeated, *backward]
    return pair_seconds(forward, layers) + pair_seconds(backward, layers, backward=True)


def _depth(counts: Counts) -> int:
    return counts.config.num_hidden_layers


def _stage(
    hardware: Hardware,
    counts: Counts,
    work: Work,
    layout: Layout,
    kinds: dict[bool, list[list[Piece]]],
    layers: range,
) -> tuple[float, float]:
    """Seconds of a micro-batch in one stage: as the work says, and with communication hidden."""
    config = counts.config
    sparse = sum(config.is_moe_layer(layer) for layer in layers)
    everything, sending, saved = 0.0, 0.0, 0.0
    for kind, count in ((False, len(layers) - sparse), (True, sparse)):
        if count:
            all_, sent = _split([*chain(*kinds[kind])])
            everything, sending = everything + count * all_, sending + count * sent
    if work.overlap and sparse:
        in_turn = sparse * _split([*chain(*kinds[True])])[0]
        saved = in_turn - _side_by_side(kinds[True], sparse) / 2
    if _depth(counts) - 1 in layers:
        passes = 3 if work.training else 1
        flops = 2.0 * work.predicted * config.hidden_size * config.vocab_size * passes
        everything += hardware.seconds(flops, 2.0 * counts.table * passes)[0]
    if layout.pp > 1:  # activations on, their gradients back
        inside = layout.pp * layout.dp <= hardware.domain
        link = hardware.nvlink if inside else hardware.network
        moved = 4.0 * work.tokens * config.hidden_size / link
        everything, sending = everything + moved, sending + moved
    return everything - saved, max(sending, everything - sending)


def _outside(hardware: Hardware, counts: Counts, work: Work, layout: Layout) -> dict[str, float]:
    """Once a step, in the largest stage: gradients to owners, weights back, the optimizer."""
    config = counts.config
    stages = [counts.stage(s, layout.ep) for s in layout.stages(_depth(counts))]
    experts, matrices, rest = max(stages, key=sum)
    size = work.gradient_bytes + 2.0
    moving = hardware.collective(size * experts, layout.replicas, layout.ep)
    moving += hardware.collective(size * (matrices + rest), layout.dp, 1)
    owned = experts / layout.replicas + (matrices + rest) / layout.dp
    expert = 3 * ns_flops((config.moe_intermediate_size, config.hidden_size)) / counts.expert
    # of the other matrices too: their sides are alike
    newton_schulz = expert * (experts / layout.replicas + matrices / layout.dp)
    passes = owned * (22 + 2 * (work.momentum_bytes - 4)) / (hardware.hbm * hardware.copy)
    state = memory(counts, work, layout).host
    return {
        "gradients and weights": moving,
        "optimizer": newton_schulz / (hardware.bf16 * hardware.gemm) + passes,
        "state from and to the host": 2 * state / hardware.host_link,
    }
