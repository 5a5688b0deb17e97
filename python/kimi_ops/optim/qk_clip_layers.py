# SPDX-License-Identifier: MIT
"""QK-Clip over the attention layers of a model, as MuonClip applies it after its update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_ops import _check
from kimi_ops.choices import GqaMode
from kimi_ops.optim import engine
from kimi_ops.optim.qk_clip import check_bounds
from kimi_ops.optim.qk_clip_projections import Part, local, of_layer, part, refuse_norms
from kimi_ops.reference.qk_clip import Layer


@dataclass
class QKClip:
    """Which attention layers MuonClip clips, and the last maxima it saw.

    Each layer has a buffer ``max_logits`` [heads] that its forward raises to the largest logits it
    sees while ``track_max_logits`` is set, which this class does; it may do so over any number of
    micro-batches. A layer is an MLA module with ``q_b_proj`` (``q_proj`` where the query is not
    compressed), ``kv_b_proj``, ``qk_nope_head_dim``, ``qk_rope_head_dim`` and ``v_head_dim``, or
    one of grouped queries with ``q_proj``, ``k_proj``, ``num_heads``, ``num_kv_heads`` and
    ``head_dim``. Biases of the projections are scaled with their weights. Layers without a softmax
    over logits (linear attention) are left out. After every step the buffers are back at -inf.

    Parameters
    ----------
    layers : sequence of nn.Module
        ``model.attention_layers()``.
    tau, alpha, gqa_mode
        As in :func:`kimi_ops.qk_clip_`.
    masters : mapping of Tensor to Tensor, optional
        fp32 copies of weights that the optimizer updates in their place; both are scaled.
    process_group : ProcessGroup, optional
        The ranks that have the same heads and other data, over which the maxima are joined. Ranks
        that have other heads (tensor parallel) are none of them: every rank gives its own heads,
        ``num_heads`` and rows. By default the group that MuonClip shares its work in.

    Attributes
    ----------
    max_logits, gamma : Tensor [layers, heads] or None
        Of the last step, before the clip; over all ranks of the group. Where layers have fewer
        heads than others, -inf and 1 fill their rows.
    nonfinite : Tensor [layers, heads] of bool or None
        Heads whose maximum was NaN or infinite: they were left alone. (A head that saw no logits
        has -inf and counts as fine.)

    Raises
    ------
    TypeError, ValueError
        When it is made, and before anything moves in a step: a layer without these names, with a
        fused weight, with normalised queries or keys (whose logits do not shrink with the weights),
        with rows that do not fit its numbers.
    """

    layers: Sequence[nn.Module]
    tau: float = 100.0
    alpha: float = 0.5
    gqa_mode: GqaMode = "query_only"
    masters: Mapping[Tensor, Tensor] | None = None
    process_group: dist.ProcessGroup | None = None
    max_logits: Tensor | None = field(default=None, init=False)
    gamma: Tensor | None = field(default=None, init=False)
    nonfinite: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.layers = list(self.layers)
        if not self.layers:
            raise ValueError(
                "QKClip: layers: expected at least one attention layer, got none; "
                "give model.attention_layers()"
            )
        group = self.process_group
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "QKClip: process_group: expected a torch.distributed.ProcessGroup, got "
                f"{type(group).__name__}; torch.distributed.group.WORLD is all ranks"
            )
        self._plan()
        for number, layer in enumerate(self.layers):
            refuse_norms("QKClip", layer, number)
        for layer in self.layers:
            layer.track_max_logits = True  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "QKClip: process_group: expected none in a copy or a pickle, got a group, which "
                "belongs to its processes; take it off and give it to the copy"
            )
        return self.__dict__

    def step(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Clip every layer by the maxima since the last step, remember them, and reset the buffers.

        With a process group (its own, else the argument), in one packed MAX all-reduce, by the
        maxima of all its ranks; without one, of the ranks that share the rows of DTensors. Nothing
        is read on the host; on a GPU the number of launches does not grow with the layers, but for
        torch's own limits on lists.
        """
        self.prepared()(process_group)

    def prepared(self) -> Callable[..., list[Tensor]]:
        """`step` in two: all that can be wrong is raised here, before weights move. What is called
        then takes the process group, rows of masters by their parameters, and what an exchange of a
        group runs in, and gives the parameters that it scaled."""
        return partial(self._clip, *self._plan())

    @torch.no_grad()
    def _clip(
        self,
        layers: list[Layer],
        parts: list[Part],
        process_group: dist.ProcessGroup | None,
        masters: Mapping[Tensor, list[tuple[Tensor, int]]] = MappingProxyType({}),
        told: Callable[[dist.ProcessGroup], AbstractContextManager[Any]] = nullcontext,
    ) -> list[Tensor]:
        buffers = self._buffers()
        # a MAX over ranks may drop NaN; +inf says the same and stays
        inf = float("inf")
        maxima = torch.nan_to_num(torch.cat(buffers), nan=inf, posinf=inf, neginf=-inf)
        for group in self._groups(process_group, parts):
            with told(group):
                dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        scaled = [of.parameter for of in parts]
        parts = [one for of in parts for one in (of, *of.copies(masters.get(of.parameter, ())))]
        gamma = engine.clip_rows_(
            [of.weight for of in parts],
            maxima,
            layers,
            [of.rows for of in parts],
            [of.power for of in parts],
            self.tau,
        )
        self.max_logits = self._by_layer(maxima, -inf)
        self.nonfinite = self._by_layer(torch.isposinf(maxima), False)
        self.gamma = self._by_layer(gamma, 1.0)
        nothing = torch.full_like(maxima, -inf).split([len(buffer) for buffer in buffers])
        torch._foreach_copy_(buffers, list(nothing))
        return scaled

    def _plan(self) -> tuple[list[Layer], list[Part]]:
        """What `engine.clip_rows_` takes; all that can be wrong is found here."""
        check_bounds("QKClip", self.tau, self.alpha)
        _check.choice("QKClip", "gqa_mode", self.gqa_mode, get_args(GqaMode))
        layers, parts = [], []
        owners: dict[int, str] = {}
        for number, module in enumerate(self.layers):
            layer, found = of_layer("QKClip", module, number, self.alpha, self.gqa_mode)
            layers.append(layer)
            for name, parameter, share in found:
                if (other := owners.setdefault(id(parameter), name)) != name:
                    raise ValueError(
                        f"QKClip: {name}: expected weights of its own, got those of {other}, which "
                        "would be clipped twice; give a layer once, untie its projections"
                    )
                master = None if self.masters is None else self.masters.get(parameter)
                for copy in (parameter,) if master is None else (parameter, master):
                    of = part("QKClip", name, copy, number, share)
                    if share.shared or share.whole:
                        parts.append(of)
        devices = {of.weight.device for of in parts} | {of.device for of in self._buffers()}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"QKClip: layers: expected maxima and weights on one device, got {names}; make a "
                "QKClip for each device and call its step()"
            )
        return layers, parts

    def _groups(
        self, given: dist.ProcessGroup | None, parts: list[Part]
    ) -> list[dist.ProcessGroup]:
        """Whose maxima count: without a group those of all that hold rows of the same weights."""
        group = given if self.process_group is None else self.process_group
        if group is not None:
            return [group]
        meshes = dict.fromkeys(of.mesh for of in parts if of.mesh is not None)
        return [mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)]

    def _buffers(self) -> list[Tensor]:
        return [local("QKClip", "max_logits", layer.max_logits)[0] for layer in self.layers]

    def _by_layer(self, packed: Tensor, rest: float) -> Tensor:
        """[heads of all layers] to [layers, heads]."""
        rows = packed.split([buffer.numel() for buffer in self._buffers()])
        if all(len(a) == len(b) for a, b in pairwise(rows)):
            return packed.view(len(rows), -1)
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=rest)
