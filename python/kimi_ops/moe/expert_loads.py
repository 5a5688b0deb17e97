# SPDX-License-Identifier: MIT
"""How many tokens every expert got, over the steps of a run: what `eplb` places replicas by."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.moe.eplb import ExpertPlacement

__all__ = ["ExpertLoads"]
_OP = "ExpertLoads"


class ExpertLoads:
    r"""Tokens of every expert of every layer, older steps counting less.

    After each step :math:`\text{totals} \leftarrow \text{decay} \cdot \text{totals} + \text{counts
    of the step}`, in fp64: ranks that add the same counts have the same bits, and so the same
    placements, without another word.

    Parameters
    ----------
    num_layers : int
        L, layers with experts.
    num_experts : int
        E.
    decay : float
        Of a step, 0 to 1; 1 counts all steps alike, 0 the last one alone. Half of the weight is
        on the last log 0.5 / log decay steps: 69 at 0.99.
    device : torch.device or str
        Of `totals`; counts that are there are added without a look at them on the host.

    Attributes
    ----------
    totals : Tensor [L, E] float64
    steps : int
        Counted so far.

    Raises
    ------
    TypeError, ValueError
        Sizes or a decay out of range; of `add`, counts that do not fit.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import ExpertLoads, eplb
    >>> loads = ExpertLoads(1, 4, decay=0.5)
    >>> for counts in ([8, 0, 0, 0], [2, 2, 2, 2]):
    ...     loads.add(0, torch.tensor(counts))
    ...     loads.step()
    >>> loads.totals.tolist()
    [[6.0, 2.0, 2.0, 2.0]]
    >>> eplb(loads.totals, 6, 1, 1, 2).counts.tolist()
    [[3, 1, 1, 1]]
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        decay: float = 0.99,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_layers", num_layers), ("num_experts", num_experts)):
            _check.between(_OP, name, value, 1, 2**31)
        if not 0 <= _check.number(_OP, "decay", decay) <= 1:
            raise ValueError(f"{_OP}: decay: expected 0 to 1, got {decay}; 1 forgets nothing")
        self.decay, self.steps = float(decay), 0
        shape = (num_layers, num_experts)
        self.totals = torch.zeros(shape, dtype=torch.float64, device=device)
        self._now = torch.zeros_like(self.totals)

    def add(self, layer: int, counts: Tensor, placement: ExpertPlacement | None = None) -> None:
        """Count a dispatch of this step.

        Parameters
        ----------
        layer : int
            From 0, of the layers with experts.
        counts : Tensor [E] or [P, E] of any real dtype
            `Handle.loads` of a dispatch, which has all ranks, or `TopkGate.tokens_per_expert` of
            this rank alone: sum the totals over ranks then.
        placement : ExpertPlacement, optional
            Where the counts are those of its replicas, R in place of E.
        """
        layers, experts = self.totals.shape
        _check.between(_OP, "layer", layer, 0, layers - 1)
        _check.tensor(_OP, "counts", counts)
        replicas = experts if placement is None else placement.phy2log.shape[1]
        if counts.dim() not in (1, 2) or counts.shape[-1] != replicas or counts.is_complex():
            raise ValueError(
                f"{_OP}: counts: expected [{replicas}] or [P, {replicas}] token counts, got "
                f"{list(counts.shape)} {counts.dtype}; pass handle.loads"
            )
        found = counts.detach().to(self.totals).reshape(-1, replicas).sum(0)
        if placement is None:
            self._now[layer] += found
        else:
            self._now[layer].index_add_(0, placement.phy2log[layer].to(found.device), found)

    def step(self) -> None:
        """The step is over: its counts join the totals."""
        self.totals.mul_(self.decay).add_(self._now)
        self._now.zero_()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint between steps."""
        return {"totals": self.totals.clone(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of as many layers and experts."""
        _check.tensor(_OP, "totals", state["totals"])
        _check.shape(_OP, "totals", state["totals"], list(self.totals.shape), "load this model's")
        self.totals.copy_(state["totals"])
        self._now.zero_()
        self.steps = int(state["steps"])
