# SPDX-License-Identifier: MIT
"""MuonClip over the parameters of a model whose experts ranks may share.

What all ranks hold and what only those of one place hold is averaged, updated and published over
different groups: by two MuonClip. Outwards they are one, with the state dict of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kimi_ops import MuonClip, QKClip, muon_param_groups
from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2
from kimi_ops.train.ranks import Ranks

Groups = list[dict[str, Any]]


def optimizer_of(model: KimiK2, ranks: Ranks, lr: float, qk_clip: QKClip) -> RunOptimizer:
    """The optimizer of a run, with masters of 16-bit weights; gradients are to be those of the
    mean over each rank's tokens."""
    groups = muon_param_groups(model)
    options: dict[str, Any] = {"lr": lr, "master_weights": True}
    if model.expert_ranks is None:
        return MuonClip(groups, qk_clip=qk_clip, process_group=ranks.everyone, **options)
    stacks = model.expert_stacks()
    origins, experts = _chosen(groups, stacks.__contains__)
    others, rest = _chosen(groups, lambda param: param not in stacks)
    return SpreadMuonClip(
        MuonClip(experts, process_group=ranks.same_experts, **options),
        MuonClip(rest, qk_clip=qk_clip, process_group=ranks.everyone, **options),
        [[name for name, _ in group["params"]] for group in groups],
        (origins, others),
        model.expert_ranks,
    )


def _chosen(groups: Groups, wanted: Callable[[Tensor], bool]) -> tuple[list[int], Groups]:
    """The groups with their wanted parameters alone, and their numbers; empty ones are left out."""
    parts = [[pair for pair in group["params"] if wanted(pair[1])] for group in groups]
    numbers = [i for i, part in enumerate(parts) if part]
    return numbers, [{**groups[i], "params": parts[i]} for i in numbers]


class SpreadMuonClip:
    """A MuonClip for this rank's experts and one for the rest, as one.

    Parameters
    ----------
    experts, rest : MuonClip
    names : list of list of str
        Of the parameters of each group of one process.
    origins : pair of list of int
        For each group of `experts` and of `rest` the group of one process that it is a part of.
    spread : ExpertRanks
    """

    def __init__(
        self,
        experts: MuonClip,
        rest: MuonClip,
        names: list[list[str]],
        origins: tuple[list[int], list[int]],
        spread: ExpertRanks,
    ) -> None:
        self._spread, self._names = spread, names
        self._numbers = {name: i for i, name in enumerate(chain.from_iterable(names))}
        self._experts, self._rest = experts, rest
        here = slice(spread.experts.start, spread.experts.stop)
        self._parts = ((experts, origins[0], here), (rest, origins[1], slice(None)))

    @property
    def param_groups(self) -> Groups:
        return [*self._experts.param_groups, *self._rest.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """As `MuonClip.step`. The gradients of experts have the tokens of all expert ranks in them,
        and MuonClip averages over the replicas alone: the mean is over the tokens of all ranks."""
        params = chain.from_iterable(group["params"] for group in self._experts.param_groups)
        gradients = [param.grad for param in params if param.grad is not None]
        torch._foreach_div_(gradients, self._spread.world)
        self._experts.step()
        self._rest.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._experts.zero_grad(set_to_none)
        self._rest.zero_grad(set_to_none)

    def gather_state_dict(self) -> dict[str, Any] | None:
        """The state of one process, on the lead; None on the others. All ranks call it."""
        rest, experts = self._rest.gather_state_dict(), self._experts.gather_state_dict()
        found = {} if rest is None else _by_name(rest)
        if experts is not None:  # in the first replica, with its own experts
            for name, entries in _by_name(experts).items():
                found[name] = {key: self._joined(value) for key, value in entries.items()}
        if rest is None or experts is None:
            return None
        options: dict[int, dict[str, Any]] = {}
        for state, (_, origins, _) in zip((experts, rest), self._parts, strict=True):
            options |= dict(zip(origins, state["param_groups"], strict=True))
        groups = [
            {**options[i], "params": [self._numbers[name] for name in names], "param_names": names}
            for i, names in enumerate(self._names)
        ]
        whole = {i: found[name] for name, i in self._numbers.items() if name in found}
        return {"state": whole, "param_groups": groups}

    def _joined(self, value: Tensor) -> Tensor:
        """The rows of all expert ranks, on the first; elsewhere its own."""
        if value.ndim == 0:
            return value
        parts = [self._spread.to_first(value, rank) for rank in range(self._spread.world)]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if found else value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of the state of one process."""
        saved = state_dict["state"], state_dict["param_groups"]
        for optimizer, origins, rows in self._parts:
            own = optimizer.state_dict()["param_groups"]
            groups = [
                {**saved[1][i], "params": group["params"], "param_names": group["param_names"]}
                for group, i in zip(own, origins, strict=True)
            ]
            state = {
                number: {
                    key: value[rows] if value.ndim else value
                    for key, value in saved[0].get(self._numbers[name], {}).items()
                }
                for group in own
                for number, name in zip(group["params"], group["param_names"], strict=True)
            }
            optimizer.load_state_dict({"state": state, "param_groups": groups})


RunOptimizer = MuonClip | SpreadMuonClip


def _by_name(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The state of each parameter by its name."""
    return {
        name: state["state"][number]
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if number in state["state"]
    }
