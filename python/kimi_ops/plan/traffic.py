# SPDX-License-Identifier: MIT
"""How often a token is sent: expected copies by link, for experts chosen uniformly.

A place (rank, node) that holds p of E experts is among the K choices of a token with probability
h(p) = 1 - C(E - p, K) / C(E, K). Of P ranks in nodes of g:

    deduplicated   one copy for each distinct rank, sum of h; over the network one for each
    (prefill,      distinct other node, forwarded inside it over NVLink
    training)
    by choice      K copies, each straight to its rank: what latency-bound kernels send (decode)

Monte-Carlo draws agree within their noise (tests/plan).
"""

from dataclasses import dataclass
from functools import cache
from math import comb

from kimi_ops.plan.hardware import Hardware

__all__ = ["Copies", "copies", "distinct", "split", "transfer"]


def split(total: int, parts: int) -> list[int]:
    """Sizes that differ by one at most, the larger ones first."""
    return [total // parts + (n < total % parts) for n in range(parts)]


def _hit(experts: int, part: int, k: int) -> float:
    return 1.0 - comb(experts - part, k) / comb(experts, k)


def distinct(experts: int, k: int, places: int) -> float:
    """Expected number of places, of `places` that share the experts, that a token goes to."""
    return sum(_hit(experts, part, k) for part in split(experts, places))


@dataclass(frozen=True)
class Copies:
    """Of a token, expected: what it puts on each link in one direction."""

    ranks: float  # distinct ranks, its own included: rows that a rank receives, by token
    off_rank: float  # leave the GPU
    nvlink: float
    network: float
    nodes: int  # of the expert-parallel group


@cache
def copies(experts: int, k: int, ep: int, domain: int, *, deduplicated: bool = True) -> Copies:
    """Copies of a token in a group of `ep` ranks, of which `domain` share NVLink."""
    held = split(experts, ep)
    ranks = [min(domain, ep - start) for start in range(0, ep, domain)]
    nodes = [sum(held[start : start + domain]) for start in range(0, ep, domain)]
    if deduplicated:
        hits = [_hit(experts, part, k) for part in held]
        local = sum(hit * (1 - 1 / ranks[rank // domain]) for rank, hit in enumerate(hits))
        network = sum(
            _hit(experts, part, k) * (1 - n / ep) for part, n in zip(nodes, ranks, strict=True)
        )
        return Copies(sum(hits), sum(hits) * (1 - 1 / ep), local, network, len(nodes))
    shares = [(k * part / experts, n) for part, n in zip(nodes, ranks, strict=True)]
    local = sum(share * (n - 1) / ep for share, n in shares)
    network = sum(share * (1 - n / ep) for share, n in shares)
    return Copies(float(k), k * (1 - 1 / ep), local, network, len(nodes))


def transfer(
    hardware: Hardware, sent: Copies, tokens: float, size: float, skew: float = 1.0
) -> tuple[float, str]:
    """Seconds to move `tokens` rows of `size` bytes, links side by side; which one it waits for."""
    if sent.off_rank == 0:
        return 0.0, "NVLink"
    rows = tokens * size * skew
    inside = (rows * sent.nvlink / hardware.nvlink, "NVLink")
    across = (rows * sent.network / hardware.network, "network")
    latency = hardware.network_latency if sent.nodes > 1 else hardware.nvlink_latency
    seconds, link = max(inside, across)
    return seconds + latency, link
