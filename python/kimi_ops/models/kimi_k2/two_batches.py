# SPDX-License-Identifier: MIT
"""Two batches through a model whose experts are spread over ranks, one's messages beside the
other's products.

    computes    attention A | attention B | experts A  | experts B | attention A | ...
    travels     combine B   | dispatch A  | dispatch B | combine A | combine B   | ...

The backward is the same schedule from right to left: autograd runs what was made last first, and
the gradient of an exchange begins where the exchange was awaited (`kimi_ops.parallel.journey`).

    computes    ... | attention A | experts B | experts A  | attention B | attention A | ...
    travels         | combine B   | combine A | dispatch B | dispatch A  | combine B   | ...

The numbers are those of one batch after the other, bit for bit. The second batch leads (it is A),
so that the first leads in the backward, and gradients are added up in the order of the batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from kimi_ops._autocast import no_cast_kept
from kimi_ops.models.kimi_k2.decoder import Decoder, DecoderLayer
from kimi_ops.models.kimi_k2.inputs import check_inputs
from kimi_ops.models.kimi_k2.moe import Leaving, MoE, Returning
from kimi_ops.models.kimi_k2.rope import rotary_tables

__all__ = ["BatchOutput", "backward_two", "check_two", "forward_two"]


class BatchOutput(NamedTuple):
    """Of one of two batches: logits [B, S, vocab_size], and its `Decoder.auxiliary_loss`."""

    logits: Tensor
    auxiliary_loss: Tensor


def forward_two(model: Decoder, first: Tensor, second: Tensor) -> tuple[BatchOutput, BatchOutput]:
    """Next-token logits of two batches, computed side by side.

    Parameters
    ----------
    model : KimiK2
        With `ExpertRanks` of ``batches=2``; all ranks call this, in the same order.
    first, second : Tensor [B, S] int64
        Ids. B and S may differ between the batches.

    Returns
    -------
    (BatchOutput, BatchOutput)
        The bits of ``model(first)`` and ``model(second)``, and `auxiliary_loss` after each.

    Raises
    ------
    TypeError, ValueError
        Ids that the model refuses, a model of one rank or with tied embeddings, whose gradients
        would be added up in another order.
    EPMismatch, EPTimeout, EPRankLost
        As `kimi_ops.ExpertParallel`.

    Notes
    -----
    After an error that all ranks have at the same place (a hook that raises, memory that is short)
    the next call works; loads and largest logits have counted what was computed. Where one rank
    alone has it the others wait for that rank until their `EPTimeout`.

    `torch.utils.checkpoint` repeats both batches or none. In a trace of `torch.profiler` the parts
    are ``batch 2: attention 0``, ``batch 2: experts 0``, ..., with the exchanges in them:
    ``dispatch: begin``, ``dispatch: wait``, ``combine: begin``, ``combine: wait``, and in the
    backward ``gradient of combine: begin``, ...

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import LocalWorld
    >>> from kimi_ops.models.kimi_k2 import (
    ...     ExpertRanks, KimiK2, KimiK2Config, backward_two, forward_two)
    >>> config = KimiK2Config.tiny()
    >>> def work(group):
    ...     with ExpertRanks(group, config, max_tokens=4, batches=2) as ranks:
    ...         model = KimiK2(config, expert_ranks=ranks)
    ...         found = forward_two(model, torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7]]))
    ...         backward_two(model, [each.logits.square().mean() for each in found])
    ...         return [tuple(each.logits.shape) for each in found]
    >>> LocalWorld(2).run(work)[0]
    [(1, 3, 64), (1, 4, 64)]
    """
    check_two(model)
    with no_cast_kept():
        pair = [_Batch(model, f"batch {n}", ids) for n, ids in ((2, second), (1, first))]
        with _abandoned_by_errors(model):
            for layer in model.decoder_layers():
                for batch in pair:
                    batch.attend(layer)
                for batch in pair:
                    batch.compute(layer)
            late, early = [batch.end() for batch in pair]
    return early, late


def backward_two(model: nn.Module, losses: Sequence[Tensor]) -> None:
    """Add the gradients of the losses of two batches to those of the parameters.

    Parameters
    ----------
    model : nn.Module
        Whose parameters may have gradients already, of batches before.
    losses : sequence of two Tensors
        Of the first and the second batch of `forward_two`, each a number.

    Notes
    -----
    The bits are those of ``losses[0].backward()`` and ``losses[1].backward()`` of batches that were
    computed one after the other: (what was there + the first) + the second. Within one backward
    autograd would add the sum of the two to what was there. An error on the way leaves gradients
    that are neither what was there nor the sums: ``zero_grad()`` and begin the step again, with the
    batches before.
    """
    held = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    if any(p._backward_hooks for p in held):
        raise ValueError(
            "backward_two: model: expected parameters without hooks of their gradients, which "
            "would be given those that are there already, got some; take the hooks off"
        )
    roots = [*losses, _Held.apply(*held)] if held else losses
    with _abandoned_by_errors(model):
        torch.autograd.backward(list(roots))


@contextmanager
def _abandoned_by_errors(model: nn.Module) -> Iterator[None]:
    """An error in the body leaves none of the model's exchanges under way: a next step may come."""
    try:
        yield
    except BaseException:
        for moe in model.modules():
            if isinstance(moe, MoE) and moe.ranks is not None:
                moe.ranks.abandon()
        raise


def check_two(model: Decoder) -> None:
    """Raise a ValueError unless two batches can be computed side by side."""
    ranks = model.expert_ranks
    if ranks is None or ranks.batches < 2:
        raise ValueError(
            "forward_two: model: expected ExpertRanks of batches=2, got "
            f"{'no expert_ranks' if ranks is None else f'batches={ranks.batches}'}; there is "
            "nothing to hide on one rank: compute one batch after the other"
        )
    if model.recompute == "full":
        raise ValueError(
            "forward_two: model: expected recompute none or selective, got full, of which a layer "
            "of one batch would exchange anew beside the other's; choose selective, or compute one "
            "batch after the other"
        )
    if model.config.tie_word_embeddings:
        raise ValueError(
            "forward_two: model: expected an embedding and a head of their own, got "
            "tie_word_embeddings, whose gradients would be added up in another order; compute one "
            "batch after the other"
        )


class _Batch:
    """Where one of the two is on its way through the layers."""

    def __init__(self, model: Decoder, name: str, ids: Tensor) -> None:
        self._model, self._name = model, name
        inputs = check_inputs(model.config, 0, ids, None, None, None)
        model.check(inputs, None, None, 0)
        self._tables = rotary_tables(model.config, inputs.positions)
        self._balance: list[Tensor] = []
        self._x = model.model.embed_tokens(ids).to(model.lm_head.weight.dtype)
        self._layer: DecoderLayer | None = None  # the last one, and where it is with this batch
        self._leaving: Leaving | None = None
        self._returning: Returning | None = None

    def attend(self, layer: DecoderLayer) -> None:
        """What the experts of the layer before gave arrives; attention; tokens leave."""
        with record_function(f"{self._name}: attention {layer.layer}"):
            self._x, self._leaving = layer.leave(self._arrived(), *self._tables)
        self._layer = layer

    def compute(self, layer: DecoderLayer) -> None:
        """Tokens arrive; experts; their results leave. A dense layer has none."""
        name = f"{self._name}: experts {layer.layer}"
        with record_function(name) if isinstance(layer.mlp, MoE) else nullcontext():
            self._returning, self._leaving = layer.compute(self._leaving), None

    def end(self) -> BatchOutput:
        model = self._model
        with record_function(f"{self._name}: head"):
            logits = model.lm_head(model.model.norm(self._arrived()))
            zero = logits.new_zeros((), dtype=torch.float32)
            return BatchOutput(logits, sum(self._balance, zero))

    def _arrived(self) -> Tensor:
        """What the layer before gives."""
        if self._layer is None:
            return self._x
        balance = self._returning and self._returning.rest.losses.balance
        if balance is not None:
            self._balance.append(balance)
        return self._layer.arrive(self._x, self._returning)


class _Held(torch.autograd.Function):
    """The gradients that parameters have, as the first of those that a backward adds up.

    They are handed over, so that the sums can use their memory.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        held = tuple(parameter.grad for parameter in ctx.parameters)
        for parameter in ctx.parameters:
            parameter.grad = None
        return held
