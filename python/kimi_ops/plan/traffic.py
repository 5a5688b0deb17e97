# SPDX-License-Identifier: MIT
"""How often a token is sent: expected copies by link, for experts chosen uniformly.

A place (rank, node) that holds p of E experts is among the K choices of a token with probability
h(p) = 1 - C(E - p, K) / C(E, K); where only experts of L of G groups may be chosen, the mean of
that over the choices of groups. Of P ranks in nodes of g:

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

__all__ = ["Copies", "copies", "distinct", "split", "starts", "transfer"]

Groups = tuple[int, int]  # G, and L that a token may choose from


def split(total: int, parts: int) -> list[int]:
    """Sizes that differ by one at most, the larger ones first."""
    return [total // parts + (n < total % parts) for n in range(parts)]


def _ranges(sizes: list[int]) -> list[range]:
    return [range(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]


@cache
def _hit(experts: int, held: range, k: int, groups: Groups) -> float:
    """Whether a token goes to the place of experts `held`."""
    ways = {(0, 0): 1}  # (groups chosen, experts held of them): in how many ways
    for group in _ranges(split(experts, groups[0])):
        here = max(0, min(held.stop, group.stop) - max(held.start, group.start))
        for (chosen, part), number in [*ways.items()]:
            key = (chosen + 1, part + here)
            ways[key] = ways.get(key, 0) + number
    allowed = experts * groups[1] // groups[0]
    missed = sum(
        number * comb(allowed - part, k)
        for (chosen, part), number in ways.items()
        if chosen == groups[1] and part <= allowed
    )
    return 1.0 - missed / (comb(*groups) * comb(allowed, k))


def distinct(experts: int, k: int, places: int, groups: Groups = (1, 1)) -> float:
    """Expected number of places, of `places` that share the experts, that a token goes to."""
    return sum(_hit(experts, held, k, groups) for held in _ranges(split(experts, places)))


@dataclass(frozen=True)
class Copies:
    """Of a token, expected: what it puts on each link in one direction."""

    ranks: float  # distinct ranks, its own included: rows that a rank receives, by token
    off_rank: float  # leave the GPU
    nvlink: float
    network: float
    nodes: int  # of the expert-parallel group


def starts(ep: int, domain: int, gpus: int) -> list[int]:
    """Where in a node groups of `ep` neighbours begin: not all do where nodes do not divide."""
    return sorted({group * ep % domain for group in range(min(gpus // ep, domain))})


@cache
def copies(
    experts: int,
    k: int,
    ep: int,
    domain: int,
    *,
    deduplicated: bool = True,
    groups: Groups = (1, 1),
    start: int = 0,
) -> Copies:
    """Copies of a token in a group of `ep` ranks; nodes of `domain`, its first rank at `start`."""
    held = _ranges(split(experts, ep))
    ends = [*range(domain - start, ep, domain), ep]
    ranks = [last - first for first, last in zip([0, *ends], ends, strict=False)]
    nodes = [
        range(held[end - n].start, held[end - 1].stop) for end, n in zip(ends, ranks, strict=True)
    ]
    if deduplicated:
        hits = [_hit(experts, part, k, groups) for part in held]
        each = [n for n in ranks for _ in range(n)]
        local = sum(hit * (1 - 1 / n) for hit, n in zip(hits, each, strict=True))
        network = sum(
            _hit(experts, part, k, groups) * (1 - n / ep)
            for part, n in zip(nodes, ranks, strict=True)
        )
        return Copies(sum(hits), sum(hits) * (1 - 1 / ep), local, network, len(nodes))
    shares = [(k * len(part) / experts, n) for part, n in zip(nodes, ranks, strict=True)]
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
