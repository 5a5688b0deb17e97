# SPDX-License-Identifier: MIT
"""One layer, one micro-batch, one rank: what is computed and sent, how long, what bounds it.

    attention projections, attention, shared expert and router      products; attention by its roof
    dispatch, permute, expert products, unpermute, combine          of a layer with experts

The pieces run one after the other. The backward has two products for each of the forward, sends
gradients of combined rows as a dispatch does and those of dispatched rows as a combine does.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kimi_ops.plan.counts import WEIGHT_BYTES, Counts
from kimi_ops.plan.hardware import Hardware
from kimi_ops.plan.rates import MODEL, expert_products
from kimi_ops.plan.traffic import copies, starts, transfer
from kimi_ops.plan.work import Work

__all__ = ["COMMUNICATION", "Piece", "again", "dense_layer", "merged", "moe_layer"]

COMMUNICATION = ("dispatch", "combine")


@dataclass(frozen=True)
class Piece:
    """A part of a layer; `bound` is tensor, memory, NVLink or network. Bytes leave a GPU."""

    name: str
    seconds: float
    bound: str
    source: str = MODEL
    nvlink_bytes: float = 0.0
    network_bytes: float = 0.0


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces of one name as one; the bound is that of the longer part."""
    found: dict[str, Piece] = {}
    for piece in pieces:
        if (old := found.get(piece.name)) is None:
            found[piece.name] = piece
            continue
        longer = max(old, piece, key=lambda p: p.seconds)
        found[piece.name] = Piece(
            piece.name,
            old.seconds + piece.seconds,
            longer.bound,
            longer.source,
            old.nvlink_bytes + piece.nvlink_bytes,
            old.network_bytes + piece.network_bytes,
        )
    return list(found.values())


def _products(
    hardware: Hardware, work: Work, name: str, parameters: float, backward: bool
) -> Piece:
    """Products of every token with matrices that all ranks hold."""
    flops = 2.0 * work.tokens * parameters * (2 if backward else 1)
    moved = parameters * WEIGHT_BYTES[work.weights][1] * (2 if backward else 1)
    return Piece(name, *hardware.seconds(flops, moved, fp8=work.weights == "fp8"))


def _attention(hardware: Hardware, counts: Counts, work: Work, backward: bool) -> list[Piece]:
    config = counts.config
    heads, rank, rope = (
        config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim,
    )  # fmt: skip
    pairs = float(work.tokens * work.context)
    rate = hardware.bf16 * hardware.attention
    if not work.decoding:  # causal: half of the pairs; the backward has 2.5 times the products
        flops = pairs * heads * (config.qk_head_dim + config.v_head_dim)
        core = Piece("attention", flops * (2.5 if backward else 1) / rate, "tensor")
    else:  # one query against latent rows, which all heads share
        flops, read = 2 * pairs * heads * (2 * rank + rope), 2 * pairs * (rank + rope)
        memory = read / (hardware.hbm * hardware.stream)
        core = Piece("attention", *max((flops / rate, "tensor"), (memory, "memory")))
    return [_products(hardware, work, "projections", counts.attention, backward), core]


def dense_layer(
    hardware: Hardware, counts: Counts, work: Work, *, backward: bool = False
) -> list[Piece]:
    return [
        *_attention(hardware, counts, work, backward),
        _products(hardware, work, "dense MLP", counts.dense, backward),
    ]


def moe_layer(
    hardware: Hardware,
    counts: Counts,
    work: Work,
    ep: int,
    *,
    backward: bool = False,
    gpus: int | None = None,
) -> list[Piece]:
    """A layer with experts, forward or backward, on the slowest of the groups of `ep` ranks.

    They are neighbours among `gpus`, one group alone by default.
    """
    config = counts.config
    k, hidden = config.num_experts_per_tok, config.hidden_size
    experts = work.slots(config.n_routed_experts)
    found = [
        copies(
            experts,
            k,
            ep,
            hardware.domain,
            deduplicated=not work.decoding,
            groups=(config.n_group, config.topk_group),
            start=start,
        )
        for start in starts(ep, hardware.domain, gpus or ep)
    ]
    sent = max(found, key=lambda sent: transfer(hardware, sent, work.tokens, 2.0 * hidden))
    rows = work.tokens * k * work.skew
    touched = 1 - (1 - k / experts) ** (work.tokens * ep)  # share of experts that get a row
    seconds, bound, source = expert_products(
        hardware,
        (hidden, config.moe_intermediate_size),
        rows,
        work.tokens * ep * k / experts,
        touched * -(-experts // ep) * counts.expert,
        work.weights,
        backward=backward,
        gradient_bytes=work.gradient_bytes,
    )
    received = work.tokens * sent.ranks * work.skew  # rows that are copied into the experts' order
    sort = (received + rows) * 2 * hidden / (hardware.hbm * hardware.copy)

    def sending(name: str, size: float) -> Piece:
        share = work.tokens * work.skew * size
        return Piece(
            name,
            *transfer(hardware, sent, work.tokens, size, work.skew),
            nvlink_bytes=share * sent.nvlink,
            network_bytes=share * sent.network,
        )

    return [
        *_attention(hardware, counts, work, backward),
        _products(hardware, work, "shared, router", counts.shared + counts.router, backward),
        sending("dispatch", 2.0 * hidden if backward else work.row_bytes(hidden)),
        Piece("permute", sort, "memory"),
        Piece("experts", seconds, bound, source),
        Piece("unpermute", sort, "memory"),
        sending("combine", 2.0 * hidden),
    ]


def again(
    hardware: Hardware, counts: Counts, work: Work, forward: list[Piece], recompute: str
) -> list[Piece]:
    """What the backward computes a second time: all, or the cheap parts that use much memory."""
    if recompute == "none":
        return []
    if recompute == "full":
        return forward
    up = _products(hardware, work, "projections", counts.up_projections, False)
    down = [p for p in forward if p.name == "experts"]  # a third of its products
    return [up, *(Piece(p.name, p.seconds / 3, p.bound, p.source) for p in down)]
