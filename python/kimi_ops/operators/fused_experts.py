# SPDX-License-Identifier: MIT
"""The operator takes the plan of the ids. An eager call makes the plan in the same native call:
`native.fused_experts` without a gradient, `Layer` with one."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.operators.registry import Operator, wanted


def _outputs(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor, source: Tensor,
    offsets: Tensor, gate_up_scale: Tensor | None, down_scale: Tensor | None, activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = source.shape[0] if save else 0
    return x.new_empty(x.shape), x.new_empty((rows, w_gate_up.shape[1]))


def _save(ctx: Any, tensors: tuple[Tensor, ...], gate_up: Tensor, activation: str) -> None:
    """`tensors` are x, both matrices, weights and the plan; an empty gate_up was not kept."""
    ctx.activation = activation
    ctx.save_for_backward(*tensors, gate_up if gate_up.shape[0] else None)
    ctx.set_materialize_grads(False)  # nobody reads a gradient of gate_up


def _gradients(ctx: Any, dy: Tensor | None) -> list[Tensor | None]:
    """Of x, both matrices and weights; None where none is needed."""
    if dy is None:
        return [None] * 4
    needs = [wanted(ctx, i) for i in range(4)]
    gradients = fused_experts_backward(dy, *ctx.saved_tensors, ctx.activation, needs)
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[:7], output[1], inputs[9])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy), *[None] * 7


class Layer(torch.autograd.Function):
    """x, w_gate_up, w_down, weights, indices, activation, save -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, indices: Tensor,
        activation: str, save: bool,
    ) -> Tensor:  # fmt: skip
        y, gate_up, *plan = _native.engine.fused_experts(
            x, w_gate_up, w_down, weights, indices, None, None, activation, save
        )
        _save(ctx, (x, w_gate_up, w_down, weights, *plan), gate_up, activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy), None, None, None


def _backward_outputs(
    dy: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor,
    source: Tensor, offsets: Tensor, gate_up: Tensor | None, activation: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, grad_gate_up, grad_down, grad_weights = (
        like.new_empty(like.shape if want else (0,))
        for like, want in zip((x, w_gate_up, w_down, weights), wanted, strict=True)
    )
    return dx, grad_gate_up, grad_down, grad_weights


fused_experts_backward = Operator(
    "fused_experts_backward(Tensor dy, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, "
    "Tensor row_map, Tensor source, Tensor offsets, Tensor? gate_up, str activation, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_outputs,
)
fused_experts = Operator(
    "fused_experts(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor row_map, "
    "Tensor source, Tensor offsets, Tensor? gate_up_scale, Tensor? down_scale, str activation, "
    "bool save) -> (Tensor, Tensor)",
    _outputs,
    _context,
    _backward,
    native="fused_experts_planned",
)
