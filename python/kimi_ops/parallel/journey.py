# SPDX-License-Identifier: MIT
"""An exchange in two steps, whose gradient is an exchange in two steps.

    forward     leave: messages begin           ...   arrive: they are there
    backward    leave: the gradients are there  ...   arrive: their messages begin

Autograd runs last what was made first. So what the forward does between the two steps, beside the
messages, is what the backward has to do while the gradients' messages are under way.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

Came = TypeVar("Came")
Gradients = Sequence[Tensor | None]
# (what was kept, the outputs' gradients) -> what waits for the gradients of the inputs
Back = Callable[[Sequence[Any], Sequence[Tensor]], Callable[[], Gradients]]


class Journey(Generic[Came]):
    """Inputs on their way to become outputs.

    Parameters
    ----------
    op : str
        Its steps are ``op: begin`` and ``op: wait`` in a trace, those of its gradient
        ``gradient of op: begin`` and ``gradient of op: wait``.
    begin : callable
        Begins the messages; its result waits for what comes.
    tie : Tensor [0] float32
        Goes from exchange to exchange: a rank on which nothing depends on what came takes part in
        the backward all the same.
    *inputs : Tensor or None
    """

    def __init__(
        self, op: str, begin: Callable[[], Callable[[], Came]], tie: Tensor, *inputs: Tensor | None
    ) -> None:
        self._op, self._link = op, _Link()
        self._tie = tie
        with torch.no_grad(), _named(f"{op}: begin"):
            self._wait = begin()
        wanted = (part is not None and part.requires_grad for part in (tie, *inputs))
        self._graded = torch.is_grad_enabled() and any(wanted)
        if self._graded:
            self._tie = _Leave.apply(op, self._link, tie, *inputs)

    def wait(self) -> Came:
        """What came."""
        with _named(f"{self._op}: wait"):
            return self._wait()

    def arrive(
        self,
        outputs: Callable[[bool], tuple[Sequence[Tensor | None], Sequence[Tensor | None]]],
        back: Back,
        *,
        constant: bool = False,
    ) -> tuple[Any, ...]:
        """(tie, *outputs) of the inputs.

        Parameters
        ----------
        outputs : callable
            Whether gradients are wanted -> (outputs, what `back` needs of the forward).
        back : callable
            Begins the messages of the gradients; its result waits for those of the inputs.
        constant : bool
            The outputs but the first have no gradient.
        """
        if not self._graded:
            with torch.no_grad():
                return (self._tie, *outputs(False)[0])
        return _Arrive.apply(self._op, self._link, outputs, back, constant, self._tie)


def _named(name: str) -> AbstractContextManager[object]:
    """A range of a trace, at no cost where nobody takes one."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


class _Link:
    """From one step of a backward to the other: what waits for the gradients of the inputs, and
    what these depend on."""

    wait: Callable[[], Gradients]
    sources: Sequence[Tensor]


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, link: _Link, tie: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.op, ctx.link = op, link
        return tie.clone()

    @staticmethod
    def backward(ctx: Any, tie: Tensor) -> tuple[Any, ...]:
        wait, sources = ctx.link.wait, ctx.link.sources
        del ctx.link.wait, ctx.link.sources
        with _named(f"gradient of {ctx.op}: wait"), torch.no_grad():
            gradients = wait()
        if torch.is_grad_enabled():
            gradients = _Once.apply(ctx.op, len(sources), *sources, *gradients)
        return (None, None, tie, *gradients)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: str, link: _Link, outputs: Callable[[bool], Any], back: Back, constant: bool,
        tie: Tensor,
    ) -> tuple[Any, ...]:  # fmt: skip
        ctx.op, ctx.link, ctx.back = op, link, back
        came, kept = outputs(ctx.needs_input_grad[-1])
        # not where the inputs left: a forward that is repeated for the backward may end with the
        # last tensor that is saved, and must not end between the two steps
        ctx.save_for_backward(tie, *kept)
        if constant:
            ctx.mark_non_differentiable(*came[1:])
        return (tie.clone(), *came)

    @staticmethod
    def backward(ctx: Any, tie: Tensor, *gradients: Tensor) -> tuple[Any, ...]:
        left, *kept = ctx.saved_tensors
        with _named(f"gradient of {ctx.op}: begin"), torch.no_grad():
            ctx.link.wait = ctx.back(kept, gradients)
        ctx.link.sources = [left, *gradients]  # `left` hangs on all inputs
        return (None, None, None, None, None, tie)


class _Once(torch.autograd.Function):
    """Gradients as they are, on which a second derivative does not end in silence: whatever they
    depend on leads through here."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Any, ...]:
        ctx.op = op
        return tuple(each if each is None else each.detach() for each in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: expected to be differentiated once at most, got a second derivative; "
            "differentiate the experts alone, or a layer on one rank"
        )
