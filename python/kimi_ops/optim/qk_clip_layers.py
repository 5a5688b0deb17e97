# SPDX-License-Identifier: MIT
"""QK-Clip over the attention layers of a model, as MuonClip applies it after its update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_ops import _check
from kimi_ops.optim.qk_clip import qk_clip_

_MLA = ("kv_b_proj", "max_logits", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MHA = ("q_proj", "k_proj", "max_logits", "num_heads", "num_kv_heads", "head_dim")


@dataclass
class QKClip:
    """Which attention layers MuonClip clips, and the last maxima it saw.

    Each layer has a buffer ``max_logits`` [heads] that its forward raises to the largest logits it
    sees while ``track_max_logits`` is set, which this class does; it may do so over any number of
    micro-batches. A layer is an MLA module with ``q_b_proj`` (``q_proj`` where the query is not
    compressed), ``kv_b_proj``, ``qk_nope_head_dim``, ``qk_rope_head_dim`` and ``v_head_dim``, or
    one of grouped queries with ``q_proj``, ``k_proj``, ``num_heads``, ``num_kv_heads`` and
    ``head_dim``. All have the same number of heads. After every step the buffers are back at -inf.

    Parameters
    ----------
    layers : sequence of nn.Module
        ``model.attention_layers()``.
    tau, alpha, gqa_mode
        As in :func:`kimi_ops.qk_clip_`.
    masters : mapping of Tensor to Tensor, optional
        fp32 copies of weights that the optimizer updates in their place; both are scaled.

    Attributes
    ----------
    max_logits, gamma : Tensor [layers, heads] or None
        Of the last step, before the clip; over all ranks.
    nonfinite : Tensor [layers, heads] of bool or None
        Heads whose maximum was NaN or infinite: they were left alone. (A head that saw no logits
        has -inf and counts as fine.)
    """

    layers: Sequence[nn.Module]
    tau: float = 100.0
    alpha: float = 0.5
    gqa_mode: str = "query_only"
    masters: Mapping[Tensor, Tensor] | None = None
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
        if not 0 < self.tau < float("inf"):
            raise ValueError(
                f"QKClip: tau: expected a positive finite number, got {self.tau}; Kimi K2 used 100"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"QKClip: alpha: expected 0 to 1, got {self.alpha}; 0.5 shares evenly")
        _check.choice("QKClip", "gqa_mode", self.gqa_mode, ("query_only", "group_max"))
        heads = {}
        for layer in self.layers:
            wanted = _MHA
            if hasattr(layer, "kv_b_proj") or not hasattr(layer, "k_proj"):
                wanted = ("q_proj" if hasattr(layer, "q_proj") else "q_b_proj", *_MLA)
            for name in wanted:
                if not hasattr(layer, name):
                    raise TypeError(
                        f"QKClip: layers: expected attention modules, got a "
                        f"{type(layer).__name__} without {name}; give model.attention_layers()"
                    )
            heads[layer.max_logits.numel()] = layer  # type: ignore[operator]
        if len(heads) > 1:
            raise ValueError(
                f"QKClip: layers: expected one number of heads, got {sorted(heads)}; "
                "make a QKClip of your own for each and call its step()"
            )
        for layer in self.layers:
            layer.track_max_logits = True  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Clip every layer by the maxima since the last step, remember them, and reset the buffers.

        With a process group, in one packed MAX all-reduce, by the maxima of all its ranks. Nothing
        is read on the host.
        """
        maxima = torch.stack([layer.max_logits for layer in self.layers])  # type: ignore[misc]
        # a MAX over ranks may drop NaN; +inf says the same and stays
        maxima = torch.where(torch.isnan(maxima), torch.inf, maxima)
        if process_group is not None:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=process_group)
        self.nonfinite = torch.isposinf(maxima)
        self.gamma = torch.stack(
            [self._clip(layer, row) for layer, row in zip(self.layers, maxima, strict=True)]
        )
        self.max_logits = maxima
        for layer in self.layers:
            layer.max_logits.fill_(float("-inf"))  # type: ignore[operator]

    def _clip(self, layer: Any, maxima: Tensor) -> Tensor:
        query = layer.q_proj if hasattr(layer, "q_proj") else layer.q_b_proj
        if hasattr(layer, "kv_b_proj"):
            key = layer.kv_b_proj
            geometry = {
                "layout": "mla",
                "qk_nope_head_dim": layer.qk_nope_head_dim,
                "qk_rope_head_dim": layer.qk_rope_head_dim,
                "v_head_dim": layer.v_head_dim,
            }
        else:
            key = layer.k_proj
            geometry = {
                "layout": "mha" if layer.num_kv_heads == layer.num_heads else "gqa",
                "num_kv_heads": layer.num_kv_heads,
                "head_dim": layer.head_dim,
                "gqa_mode": self.gqa_mode,
            }
        return qk_clip_(
            maxima,
            q_weight=self._copies(query.weight),
            k_weight=self._copies(key.weight),
            tau=self.tau,
            alpha=self.alpha,
            **geometry,
        )

    def _copies(self, weight: Tensor) -> list[Tensor]:
        master = None if self.masters is None else self.masters.get(weight)
        return [weight] if master is None else [weight, master]
