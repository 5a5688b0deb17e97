# SPDX-License-Identifier: MIT
from typing import Any

from torch import Tensor

from kimi_ops.operators.registry import Operator


def _plan_outputs(
    indices: Tensor, num_experts: int, align: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    capacity = indices.shape[0] * indices.shape[1] + num_experts * (align - 1)
    return (
        indices.new_empty(indices.shape),
        indices.new_empty((capacity,)),
        indices.new_empty((num_experts,)),
        indices.new_empty((num_experts,)),
    )


permute_plan = Operator(
    "permute_plan(Tensor indices, int num_experts, int align) -> (Tensor, Tensor, Tensor, Tensor)",
    _plan_outputs,
)

# ---- permute: its backward is unpermute without weights


def _permute_output(x: Tensor, row_map: Tensor, source: Tensor) -> Tensor:
    return x.new_empty((source.shape[0], x.shape[1]))


def _permute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _permute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return unpermute(dy, *ctx.saved_tensors, None), None, None


permute = Operator(
    "permute(Tensor x, Tensor row_map, Tensor source) -> Tensor",
    _permute_output,
    _permute_context,
    _permute_backward,
)

# ---- unpermute: its backward is permute, scaled, with a dot product beside it


def _unpermute_output(y: Tensor, row_map: Tensor, *_: Any) -> Tensor:
    return y.new_empty((row_map.shape[0], y.shape[1]))


def _unpermute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, row_map, source, weights = inputs
    ctx.save_for_backward(None if weights is None else y, row_map, source, weights)


def _unpermute_backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    y, row_map, source, weights = ctx.saved_tensors
    if weights is None:
        return permute(dx, row_map, source), None, None, None
    grad_y, grad_weights = unpermute_backward(dx, y, row_map, source, weights)
    return grad_y, None, None, grad_weights


def _gradients(
    dx: Tensor, y: Tensor, row_map: Tensor, source: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


unpermute_backward = Operator(
    "unpermute_backward(Tensor grad_x, Tensor y, Tensor row_map, Tensor source, Tensor weights) "
    "-> (Tensor, Tensor)",
    _gradients,
)
unpermute = Operator(
    "unpermute(Tensor y, Tensor row_map, Tensor source, Tensor? weights) -> Tensor",
    _unpermute_output,
    _unpermute_context,
    _unpermute_backward,
)

# ---- sort_chunks: its backward is its inverse


def _sort_chunks_output(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _sort_chunks_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, split_sizes, order, ctx.inverse = inputs
    ctx.save_for_backward(split_sizes, order)


def _sort_chunks_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return sort_chunks(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


sort_chunks = Operator(
    "sort_chunks(Tensor x, Tensor split_sizes, Tensor order, bool inverse) -> Tensor",
    _sort_chunks_output,
    _sort_chunks_context,
    _sort_chunks_backward,
)
