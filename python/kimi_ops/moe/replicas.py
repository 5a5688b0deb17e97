# SPDX-License-Identifier: MIT
"""Which replica of an expert a token goes to."""

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.moe.eplb import ExpertPlacement
from kimi_ops.moe.permute import permute_plan

__all__ = ["replica_ids"]
_OP = "replica_ids"


def replica_ids(
    indices: Tensor, placement: ExpertPlacement, layer: int = 0, *, rank: int = 0
) -> Tensor:
    """Turn experts into replicas of them, each of which gets as many tokens as the others.

    The n-th pair (by token, then slot) of expert e goes to its replica
    ``log2phy[layer, e, (n + rank) % counts[layer, e]]``: in turns, so the replicas of an expert
    differ by one pair at most, on every rank; ranks begin with different ones, which spreads them
    where each has few tokens.

    Parameters
    ----------
    indices : Tensor [T, K] int32 or int64
        Experts; -1 and E are dropped pairs, which become -1.
    placement : ExpertPlacement
        Of `eplb`. Without a copy where its tensors are on the device of the indices.
    layer : int
        The row of the placement.
    rank : int
        Of the caller, where ranks choose for themselves.

    Returns
    -------
    Tensor [T, K] int32
        Replicas, 0 to R - 1: the ids for an `ExpertParallel` of ``num_experts=R``, on whose rank g
        are the replicas g R / P to (g + 1) R / P.

    Raises
    ------
    TypeError, ValueError
        Not ids, or a layer the placement does not have.

    Notes
    -----
    Nothing is read on the host. Replicas are copies, so ``layout="expert_direct"`` gives the bits
    that experts without replicas give; with "rank_dedup" sums are rounded by rank, and which ranks
    they are is another here.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import eplb, replica_ids
    >>> placement = eplb(torch.tensor([[6, 1, 1, 2]]), 6, 1, 1, 2)
    >>> placement.phy2log.tolist()
    [[0, 0, 1, 3, 0, 2]]
    >>> replica_ids(torch.tensor([[0, 3], [0, 1], [0, -1]]), placement).tolist()
    [[0, 3], [1, 2], [4, -1]]
    """
    _check.tensor(_OP, "indices", indices)
    _check.dtype(_OP, "indices", indices, (torch.int32, torch.int64))
    _check.shape(_OP, "indices", indices, ("T", "K"), "give a row of experts a token")
    if not isinstance(placement, ExpertPlacement):
        raise TypeError(
            f"{_OP}: placement: expected an ExpertPlacement, got {type(placement).__name__}; "
            "pass what eplb gives"
        )
    _check.between(_OP, "layer", layer, 0, len(placement.counts) - 1)
    _check.between(_OP, "rank", rank, 0, 2**30)
    experts, device = placement.counts.shape[1], indices.device
    # on a GPU a look at them would wait, and a graph cannot look
    if device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = (int(limit) for limit in indices.aminmax())
        if low < -1 or high > experts:
            raise ValueError(
                f"{_OP}: indices: expected ids in -1 .. {experts}, got {low} .. {high}; these are "
                "experts, not their replicas"
            )
    plan = permute_plan(indices, experts)
    counts, places = (x[layer].to(device) for x in (placement.counts, placement.log2phy))
    # padded with a place for dropped pairs
    counts = torch.cat([counts, counts.new_ones(1)])
    places = torch.cat([places, places.new_full((1, places.shape[1]), -1)])
    starts = torch.cat([plan.offsets - plan.tokens_per_expert, plan.offsets.new_zeros(1)])
    known = indices.long().remainder(experts + 1)  # -1 is E
    turn = plan.row_map.long().clamp(min=0) - starts.long()[known] + rank
    return places[known, turn.remainder(counts[known])].int()
