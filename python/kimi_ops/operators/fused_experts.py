# SPDX-License-Identifier: MIT
"""The operator takes the plan of the ids. An eager call makes the plan in the same native call:
`native.fused_experts` without a gradient, `Layer` with one."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.operators.registry import Operator, wanted

INPUTS = (0, 1, 2, 3, 9, 10)  # of the operator, that may want gradients


def _outputs(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor, source: Tensor,
    offsets: Tensor, gate_up_scale: Tensor | None, down_scale: Tensor | None,
    b_gate_up: Tensor | None, b_down: Tensor | None, activation: str, numbers: list[float],
    weights_first: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = source.shape[0] if save else 0
    return x.new_empty(x.shape), x.new_empty((rows, w_gate_up.shape[1]))


def _save(
    ctx: Any, tensors: tuple[Tensor, ...], gate_up: Tensor, biases: tuple[Tensor | None, ...],
    activation: tuple[str, tuple[float, ...]], inputs: tuple[int, ...],
) -> None:  # fmt: skip
    """`tensors` are x, both matrices, weights and the plan; an empty gate_up was not kept. `inputs`
    are the places of those that may want gradients."""
    ctx.activation, ctx.inputs = activation, inputs
    ctx.save_for_backward(*tensors, gate_up if gate_up.shape[0] else None, *biases)
    ctx.set_materialize_grads(False)  # nobody reads a gradient of gate_up


def _gradients(ctx: Any, dy: Tensor | None) -> list[Tensor | None]:
    """Of x, both matrices, weights and both biases; None where none is needed."""
    if dy is None:
        return [None] * 6
    # `wanted` counts tensors alone, and a bias may be none
    *four, b_gate_up, b_down = ctx.inputs
    needs = [wanted(ctx, i) for i in four]
    needs += [bool(ctx.needs_input_grad[i]) for i in (b_gate_up, b_down)]
    gradients = fused_experts_backward(dy, *ctx.saved_tensors, *ctx.activation, needs)
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[:7], output[1], inputs[9:11], inputs[11:13], INPUTS)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, dy)
    return *gradients[:4], *[None] * 5, *gradients[4:], *[None] * 4


class Layer(torch.autograd.Function):
    """x, w_gate_up, w_down, weights, indices, b_gate_up, b_down, activation, its numbers,
    weights_first, save -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, indices: Tensor,
        b_gate_up: Tensor | None, b_down: Tensor | None, activation: str,
        numbers: tuple[float, ...], weights_first: bool, save: bool,
    ) -> Tensor:  # fmt: skip
        biases = b_gate_up, b_down
        y, gate_up, *plan = _native.engine.fused_experts(
            x, w_gate_up, w_down, weights, indices, None, None, *biases, activation, numbers,
            weights_first, save,
        )  # fmt: skip
        tensors = x, w_gate_up, w_down, weights, *plan
        _save(ctx, tensors, gate_up, biases, (activation, numbers), (0, 1, 2, 3, 5, 6))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _gradients(ctx, dy)
        return *gradients[:4], None, *gradients[4:], *[None] * 4


def _backward_outputs(
    dy: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor,
    source: Tensor, offsets: Tensor, gate_up: Tensor | None, b_gate_up: Tensor | None,
    b_down: Tensor | None, activation: str, numbers: list[float], wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = x, w_gate_up, w_down, weights, b_gate_up, b_down
    return tuple(
        (x if like is None else like).new_empty(like.shape if want and like is not None else (0,))
        for like, want in zip(inputs, wanted, strict=True)
    )


fused_experts_backward = Operator(
    "fused_experts_backward(Tensor dy, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, "
    "Tensor row_map, Tensor source, Tensor offsets, Tensor? gate_up, Tensor? b_gate_up, "
    "Tensor? b_down, str activation, float[] numbers, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_outputs,
)
fused_experts = Operator(
    "fused_experts(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor row_map, "
    "Tensor source, Tensor offsets, Tensor? gate_up_scale, Tensor? down_scale, Tensor? b_gate_up, "
    "Tensor? b_down, str activation, float[] numbers, bool weights_first, bool save) -> "
    "(Tensor, Tensor)",
    _outputs,
    _context,
    _backward,
    native="fused_experts_planned",
)
