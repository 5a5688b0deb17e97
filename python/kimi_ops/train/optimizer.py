# SPDX-License-Identifier: MIT
"""MuonClip over the parameters that a rank has of a model: ranks may share the experts of a layer,
and the layers.

What all ranks of a stage hold and what only those of one place hold is averaged, updated and
published over different groups: by two MuonClip. Outwards they are one, with the state dict of one
process.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops import MuonClip, QKClip, muon_param_groups
from kimi_ops.models.kimi_k2 import ExpertRanks
from kimi_ops.models.kimi_k2.decoder import Decoder
from kimi_ops.train.ranks import Ranks

Groups = list[dict[str, Any]]


class Part(NamedTuple):
    """A MuonClip, the group of one process that each of its groups is a part of, and the experts
    whose rows it has of a state; None: it has all rows."""

    optimizer: MuonClip
    origins: list[int]
    experts: range | None


def optimizer_of(model: Decoder, ranks: Ranks, lr: float, qk_clip: QKClip) -> RunOptimizer:
    """The optimizer of a run, with masters of 16-bit weights; gradients are to be those of the
    mean over each rank's tokens."""
    options: dict[str, Any] = {"lr": lr, "master_weights": True}
    rest = {**options, "qk_clip": qk_clip, "process_group": ranks.same_stage}
    rest["stages"] = ranks.stages
    if model.expert_ranks is None and ranks.stages is None:
        return MuonClip(muon_param_groups(model), **rest)
    groups = muon_param_groups(Decoder(model.config, device="meta"))  # of one process
    names = [[name for name, _ in group["params"]] for group in groups]
    here, stacks = dict(model.named_parameters()), model.expert_stacks()
    parts = []
    if stacks:
        assert model.expert_ranks is not None
        origins, chosen = _chosen(groups, {n: p for n, p in here.items() if p in stacks})
        optimizer = MuonClip(chosen, process_group=ranks.same_experts, **options)
        parts.append(Part(optimizer, origins, model.expert_ranks.experts))
    origins, chosen = _chosen(groups, {n: p for n, p in here.items() if p not in stacks})
    parts.append(Part(MuonClip(chosen, **rest), origins, None))
    return SharedMuonClip(parts, names, model.expert_ranks, ranks.stages)


def _chosen(groups: Groups, here: dict[str, Tensor]) -> tuple[list[int], Groups]:
    """The groups with the parameters of `here` alone, and their numbers; empty ones are left
    out."""
    parts = [[(name, here[name]) for name, _ in g["params"] if name in here] for g in groups]
    numbers = [i for i, part in enumerate(parts) if part]
    return numbers, [{**groups[i], "params": parts[i]} for i in numbers]


class SharedMuonClip:
    """The MuonClip of what this rank has, as one.

    Parameters
    ----------
    parts : list of Part
        For this rank's experts, where ranks share them, and for the rest.
    names : list of list of str
        Of the parameters of each group of one process.
    spread : ExpertRanks or None
    stages : ProcessGroup or None
        A rank of each stage.
    """

    def __init__(
        self,
        parts: list[Part],
        names: list[list[str]],
        spread: ExpertRanks | None,
        stages: dist.ProcessGroup | None,
    ) -> None:
        self._parts, self._names, self._spread, self._stages = parts, names, spread, stages
        self._numbers = {name: i for i, name in enumerate(chain.from_iterable(names))}

    @property
    def param_groups(self) -> Groups:
        return [group for part in self._parts for group in part.optimizer.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """As `MuonClip.step`. The gradients of experts have the tokens of all expert ranks in them,
        and MuonClip averages over the replicas alone: the mean is over the tokens of all ranks."""
        for optimizer, _, experts in self._parts:
            if experts is not None:
                assert self._spread is not None
                params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
                gradients = [param.grad for param in params if param.grad is not None]
                torch._foreach_div_(gradients, self._spread.world)
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.optimizer.zero_grad(set_to_none)

    def gather_state_dict(self) -> dict[str, Any] | None:
        """The state of one process, on the lead; None on the others. All ranks call it."""
        found: dict[str, dict[str, Tensor]] = {}
        options: dict[int, dict[str, Any]] = {}
        first = True  # of this stage, to which the others have sent what they have
        for optimizer, origins, experts in self._parts:
            state = optimizer.gather_state_dict()
            if state is None:
                first = False
                continue
            mine = _by_name(state)
            if experts is not None:
                mine = {
                    name: {key: self._joined(value) for key, value in entries.items()}
                    for name, entries in mine.items()
                }
            found |= mine
            options |= dict(zip(origins, state["param_groups"], strict=True))
        if not first:
            return None
        if self._stages is not None:
            lead = dist.get_rank(self._stages) == 0
            told: list[Any] | None = [None] * dist.get_world_size(self._stages) if lead else None
            root = dist.get_global_rank(self._stages, 0)
            dist.gather_object((found, options), told, root, group=self._stages)
            if told is None:
                return None
            found = {name: entries for part, _ in told for name, entries in part.items()}
            options = {i: group for _, part in told for i, group in part.items()}
        groups = [
            {**options[i], "params": [self._numbers[name] for name in names], "param_names": names}
            for i, names in enumerate(self._names)
        ]
        whole = {i: found[name] for name, i in self._numbers.items() if name in found}
        return {"state": whole, "param_groups": groups}

    def _joined(self, value: Tensor) -> Tensor:
        """The rows of all expert ranks, on the first; elsewhere its own."""
        assert self._spread is not None
        if value.ndim == 0:
            return value
        parts = [self._spread.to_first(value, rank) for rank in range(self._spread.world)]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if found else value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of the state of one process."""
        saved = state_dict["state"], state_dict["param_groups"]
        for optimizer, origins, experts in self._parts:
            rows = slice(None) if experts is None else slice(experts.start, experts.stop)
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


RunOptimizer = MuonClip | SharedMuonClip


def _by_name(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The state of each parameter by its name."""
    return {
        name: state["state"][number]
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if number in state["state"]
    }
