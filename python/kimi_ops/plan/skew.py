# SPDX-License-Identifier: MIT
"""How much more the busiest rank gets than the mean, by the size of the groups that share experts.

It grows with the number of ranks: one rank with all experts has none, and a rank whose experts are
in every choice has no more. Loads that were measured say it for each size.
"""

from collections.abc import Sequence
from functools import cache

import torch

from kimi_ops import _check
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.moe.eplb import eplb
from kimi_ops.plan.work import Loads, Work

__all__ = ["busiest", "checked_loads"]


def busiest(config: KimiK2Config, work: Work, ep: int, domain: int) -> float:
    """Rows of the busiest of `ep` ranks by the mean: `work.skew` times that of its loads."""
    places, k = work.slots(config.n_routed_experts), config.num_experts_per_tok
    held = -(-places // ep)
    if work.loads is None:
        found = held * ep / places  # ranks with one expert more
    else:
        nodes = ep // domain if ep % domain == 0 else 1
        found = _of_loads(work.loads, ep, places, config.n_group, nodes)
    return min(work.skew * found, min(k, held) * ep / k)


@cache
def _of_loads(loads: Loads, ep: int, places: int, groups: int, nodes: int) -> float:
    """The mean over layers, which follow each other, of the busiest rank by the mean of ranks."""
    table = torch.tensor(loads, dtype=torch.float64)
    if places == table.shape[1]:
        sizes = torch.tensor([places // ep + (n < places % ep) for n in range(ep)])
        ranks = torch.arange(ep).repeat_interleave(sizes).expand(table.shape)
        shares = table
    else:
        placed = eplb(table, places, groups, nodes, ep)
        shares = (table / placed.counts).gather(1, placed.phy2log)
        ranks = (torch.arange(places) // (places // ep)).expand(shares.shape)
    rows = torch.zeros(len(table), ep, dtype=torch.float64).scatter_add_(1, ranks, shares)
    return float((rows.amax(1) / rows.mean(1)).mean())


def checked_loads(config: KimiK2Config, loads: object) -> Loads:
    """[layers, experts] as tuples; one row stands for all layers."""
    experts = config.n_routed_experts
    mend = f"give a row of {experts} token counts for each layer, or one row"
    try:
        table = torch.as_tensor(loads).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"plan: loads: expected a matrix of numbers, got {error}; {mend}") from None
    table = table[None] if table.dim() == 1 else table
    _check.shape("plan", "loads", table, ("L", experts), mend)
    sums = table.sum(1)
    if not len(table) or not bool((torch.isfinite(sums) & (sums > 0)).all()) or table.min() < 0:
        raise ValueError(
            "plan: loads: expected finite counts of at least 0, some in each layer, got others; "
            f"{mend}"
        )
    rows: Sequence[list[float]] = table.tolist()
    return tuple(map(tuple, rows))
