# SPDX-License-Identifier: MIT
"""Some layers of a model, as a stage of a pipeline.

    stage 0      embedding, layers 0 .. a      ids [B, S]    -> hidden [B, S, H]
    stage 1      layers a .. b                 hidden        -> hidden
    stage 2      layers b .. L, norm, head     hidden        -> logits [B, S, vocabulary]

For `torch.distributed.pipelining`, whose schedules move hidden values and their gradients. The
names of parameters are those of the whole model: the state dicts of all stages are its.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_ops import _check
from kimi_ops.models.kimi_k2.decoder import Decoder, DecoderLayer
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.inputs import check_inputs
from kimi_ops.models.kimi_k2.pretrained import (
    keep_quantized,
    load_weights,
    read_config,
    save_weights,
    whole,
)
from kimi_ops.models.kimi_k2.rope import rotary_tables

__all__ = ["Stage", "load_stage"]


class Stage(Decoder):
    """The layers `layers` of a model, which gives them up; with layer 0 goes the embedding, with
    the last one norm and head.

    The balance losses of its layers, divided by `micro_batches`, are part of what its backward
    differentiates, micro-batch by micro-batch: a schedule only sees the loss of the last stage.
    `auxiliary_loss()` is their sum over the forwards since `reset_statistics`, a number without a
    graph.

    Parameters
    ----------
    model : KimiK2
        Of which every stage has a copy: on the meta device one without memory. With `expert_ranks`
        its experts are spread over the ranks of the stage.
    layers : range
        Neighbours.
    micro_batches : int
        Of a step, where the loss function divides by their number; 1 where the schedule divides the
        gradients (``scale_grads``).
    stages : ProcessGroup, optional
        A rank of each stage, in their order, for `save_pretrained`.

    Raises
    ------
    ValueError
        Layers that the model does not have, an embedding that is the head as well.

    Notes
    -----
    `load_stage` makes one of a checkpoint.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, Stage
    >>> parts = [Stage(KimiK2(KimiK2Config.tiny()), layers) for layers in (range(2), range(2, 3))]
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> torch.equal(parts[1](parts[0](ids)), KimiK2(KimiK2Config.tiny())(ids))
    True
    """

    _balance: Tensor

    def __init__(
        self,
        model: Decoder,
        layers: range,
        *,
        micro_batches: int = 1,
        stages: dist.ProcessGroup | None = None,
    ) -> None:
        config = model.config
        total = config.num_hidden_layers
        neighbours = isinstance(layers, range) and len(layers) > 0 and layers.step == 1
        if not neighbours or layers.start < 0 or layers.stop > total:
            raise ValueError(
                f"Stage: layers: expected a range of neighbours among the {total} of the model, "
                f"got {layers!r}; kimi_ops.plan.work.Layout.stages shares them out"
            )
        _check.between("Stage", "micro_batches", micro_batches, 1, 2**31 - 1)
        if config.tie_word_embeddings:
            raise ValueError(
                "Stage: model: expected an embedding and a head of their own, got "
                "tie_word_embeddings; they are on different stages"
            )
        nn.Module.__init__(self)
        self.config, self.expert_ranks, self.layers = config, model.expert_ranks, layers
        self.micro_batches, self.stages = micro_batches, stages
        self.first, self.last = layers.start == 0, layers.stop == total
        self._shapes = model.shapes()
        ends = ("model.embed_tokens.",) * self.first + ("model.norm.", "lm_head.") * self.last
        self.prefixes = (*(f"model.layers.{number}." for number in layers), *ends)
        self.model, self.lm_head = model.model, model.lm_head
        for number in set(range(total)) - set(layers):
            self.model.layers[number] = nn.Identity()
        if not self.first:
            self.model.embed_tokens = nn.Identity()
        if not self.last:
            self.model.norm, self.lm_head = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.reset_statistics()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, S, H], from the last stage logits, from ids [B, S] or what the stage before gives."""
        self.check_mode()
        ids, hidden = (x, None) if self.first else (None, x)
        inputs = check_inputs(self.config, 0, ids, hidden, None, None)
        x = self.model.embed_tokens(x)
        cos, sin = rotary_tables(self.config, inputs.positions)
        for layer in self.decoder_layers():
            x = layer(x, cos, sin)
        x = self.lm_head(self.model.norm(x))
        losses = [moe.balance_loss for moe in self.moe_layers() if moe.balance_loss is not None]
        balance = sum(losses, torch.zeros_like(self._balance)) / self.micro_batches
        self._balance = self._balance + balance.detach()
        return _Beside.apply(x, balance)

    def allocate(self, device: torch.device | str) -> None:
        super().allocate(device)
        self.reset_statistics()

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
        """As `KimiK2.save_pretrained`: the rank of the first stage writes what one process would.
        All ranks of `stages` call it, and those that share the experts with one of them."""
        if self.stages is None and not (self.first and self.last):
            raise ValueError(
                "save_pretrained: stages: expected a group with a rank of each stage, got None "
                f"beside layers {self.layers}, which are no model; give it when the Stage is made"
            )
        save_weights(self, folder, max_shard_bytes=max_shard_bytes, stages=self.stages)

    def decoder_layers(self) -> Iterator[DecoderLayer]:
        for number in self.layers:
            yield cast(DecoderLayer, self.model.layers[number])

    def auxiliary_loss(self) -> Tensor:
        return self._balance

    def reset_statistics(self) -> None:
        super().reset_statistics()
        device = next(self.parameters()).device
        self._balance = torch.zeros((), dtype=torch.float32, device=device)


def load_stage(
    folder: str | Path,
    layers: range,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    experts: str | None = None,
    expert_ranks: ExpertRanks | None = None,
    text_only: bool = False,
    **options: Any,
) -> Stage:
    """Some layers of a checkpoint as a stage: only the files that hold its tensors are opened, and
    what is missing or unknown among those of other stages is their own concern.

    Parameters
    ----------
    folder, device, dtype, experts, expert_ranks, text_only
        As of `KimiK2.from_pretrained`.
    layers, options
        As of `Stage`.

    Raises
    ------
    TypeError, ValueError
        As `KimiK2.from_pretrained` and `Stage`.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, load_stage
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     KimiK2(KimiK2Config.tiny()).save_pretrained(folder)
    ...     first, last = (load_stage(folder, layers) for layers in (range(2), range(2, 3)))
    >>> last(first(torch.tensor([[1, 2, 3]]))).shape
    torch.Size([1, 3, 64])
    """
    config, dtype = read_config(folder, dtype, text_only=text_only)
    model = Decoder(config, device="meta", dtype=dtype, expert_ranks=expert_ranks)
    stage = Stage(model, layers, **options)
    if experts is not None:
        keep_quantized(whole(stage), experts)
    load_weights(stage, folder, device=device, text_only=text_only)
    return stage


class _Beside(torch.autograd.Function):
    """x; backward, the gradient of a loss beside those that x leads to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        return dx, dx.new_ones((), dtype=torch.float32)
