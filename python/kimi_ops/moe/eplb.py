# SPDX-License-Identifier: MIT
"""Where the replicas of busy experts go: DeepSeek's expert-parallelism load balancer (EPLB).

Three greedy steps a layer, on loads that were counted earlier (tokens an expert got):

    groups    -> nodes   packed, so that a token limited to few groups stays on few nodes
    experts   -> replicas in each node: the expert whose replica carries the most gets one more
    replicas  -> GPUs    of the node, packed

Packing gives every pack equally many items: from the heaviest on, each goes to the lightest pack
that has room. Ties go to the lower index everywhere. O(L R log R) on the host, no device touched.
"""

import heapq
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from kimi_ops import _check

__all__ = ["ExpertPlacement", "eplb"]
_OP = "eplb"


class ExpertPlacement(NamedTuple):
    """Which expert each replica is, and where each expert's replicas are; int64, on the CPU."""

    phy2log: Tensor  # [L, R] expert of each replica; GPU g holds replicas g R / G to (g + 1) R / G
    log2phy: Tensor  # [L, E, X] replicas of each expert, ascending, -1 beyond its count
    counts: Tensor  # [L, E] replicas of each expert, X the largest


def eplb(
    weights: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> ExpertPlacement:
    r"""Place replicas of experts on GPUs so that no GPU gets far more tokens than the others.

    Hierarchical where `num_nodes` divides `num_groups`: groups go to nodes whole, experts are
    replicated inside their node. Otherwise, and with one group on one node, global: any replica on
    any GPU. An expert of load :math:`w` with :math:`c` replicas puts :math:`w / c` on each.

    Parameters
    ----------
    weights : Tensor [L, E]
        Loads, at least 0: tokens of each expert of each layer, of any real dtype.
    num_replicas : int
        R, at least E; num_gpus divides it.
    num_groups : int
        Groups of consecutive experts, of group-limited routing (`topk_gate`'s num_groups; Kimi K2
        has 1); divides E.
    num_nodes : int
        Nodes with fast links inside; divides num_gpus.
    num_gpus : int
        G.

    Returns
    -------
    ExpertPlacement
        phy2log [L, R], log2phy [L, E, X], counts [L, E].

    Raises
    ------
    TypeError, ValueError
        Not a matrix of finite loads, or sizes that do not divide.

    Notes
    -----
    The loads of the GPUs of a node stay below their mean plus the heaviest replica. The algorithm
    is the published one of DeepSeek (EPLB, 2025); `phy2log` is its map.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import eplb
    >>> placement = eplb(torch.tensor([[6, 1, 1, 2]]), 6, 1, 1, 2)
    >>> placement.phy2log.tolist(), placement.counts.tolist()
    ([[0, 0, 1, 3, 0, 2]], [[3, 1, 1, 1]])
    """
    experts = _checked(weights, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    rows = [
        _layer(loads, num_replicas, num_groups, num_nodes, num_gpus)
        for loads in weights.detach().double().cpu().tolist()
    ]
    phy2log = torch.tensor(rows, dtype=torch.int64).view(len(rows), num_replicas)
    counts = torch.zeros(len(rows), experts, dtype=torch.int64)
    counts.scatter_add_(1, phy2log, torch.ones_like(phy2log))
    return ExpertPlacement(phy2log, _replicas_of(phy2log, counts), counts)


def _checked(weights: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> int:
    _check.tensor(_OP, "weights", weights)
    _check.shape(_OP, "weights", weights, ("L", "E"), "give one row of loads a layer")
    experts = weights.shape[1]
    sizes = {"num_replicas": replicas, "num_groups": groups, "num_nodes": nodes, "num_gpus": gpus}
    for name, value in sizes.items():
        if _check.integer(_OP, name, value) < 1:
            raise ValueError(f"{_OP}: {name}: expected at least 1, got {value}; count from 1")
    if weights.is_meta:
        raise TypeError(f"{_OP}: weights: expected loads, got a meta tensor; pass token counts")
    if weights.is_complex():
        raise TypeError(f"{_OP}: weights: expected real loads, got {weights.dtype}; pass counts")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(
            f"{_OP}: weights: expected finite loads of at least 0, got others; pass token counts"
        )
    if replicas < experts:
        raise ValueError(
            f"{_OP}: num_replicas: expected at least one for each of {experts} experts, got "
            f"{replicas}; give {experts} or more"
        )
    for name, whole, part, size in (
        ("num_groups", "experts", groups, experts),
        ("num_gpus", "replicas", gpus, replicas),
        ("num_nodes", "GPUs", nodes, gpus),
    ):
        if size % part:
            raise ValueError(
                f"{_OP}: {name}: expected a divisor of {size} {whole}, got {part}; "
                f"{_nearest(name, part, size)}"
            )
    return experts


def _nearest(name: str, part: int, size: int) -> str:
    """How to mend sizes that do not divide."""
    if name == "num_gpus":  # more replicas are what one may choose
        return f"take {-(-size // part) * part} replicas"
    return f"take {max(d for d in range(1, part) if size % d == 0)}"


def _layer(loads: list[float], replicas: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """The expert of each replica of one layer."""
    size = len(loads) // groups
    totals = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
    placed: list[int] = []
    for groups_here in _pack(totals, nodes):
        experts = [g * size + e for g in groups_here for e in range(size)]
        copies = _replicate([loads[e] for e in experts], replicas // nodes)
        counts = Counter(copies)
        shares = [loads[experts[e]] / counts[e] for e in copies]
        for pack in _pack(shares, gpus // nodes):
            placed += [experts[copies[item]] for item in pack]
    return placed


def _replicate(loads: list[float], replicas: int) -> list[int]:
    """Each expert once, in order; then, one by one, whose replicas carry the most."""
    copies, counts = list(range(len(loads))), [1] * len(loads)
    heap = [(-load, e) for e, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(replicas - len(loads)):
        e = heap[0][1]
        counts[e] += 1
        copies.append(e)
        heapq.heapreplace(heap, (-loads[e] / counts[e], e))
    return copies


def _pack(weights: list[float], packs: int) -> list[list[int]]:
    """Equally many items in every pack, the sums about equal; one item a pack keeps its place."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    heap = [(0.0, pack) for pack in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        load, pack = heapq.heappop(heap)
        packed[pack].append(item)
        if len(packed[pack]) < room:
            heapq.heappush(heap, (load + weights[item], pack))
    return packed


def _replicas_of(phy2log: Tensor, counts: Tensor) -> Tensor:
    """Replicas of each expert, in ascending order."""
    layers, experts = counts.shape
    widest = int(counts.max()) if counts.numel() else 0
    order = torch.argsort(phy2log, dim=1, stable=True)  # replicas by expert
    owner = phy2log.gather(1, order)
    first = (counts.cumsum(1) - counts).gather(1, owner)  # where the expert's replicas begin
    place = torch.arange(phy2log.shape[1]) - first
    log2phy = torch.full((layers, experts * widest), -1, dtype=torch.int64)
    return log2phy.scatter_(1, owner * widest + place, order).view(layers, experts, widest)
