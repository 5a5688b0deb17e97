# SPDX-License-Identifier: MIT
"""The operators behind `kimi_ops.permute`: native calls, fake tensors, gradients."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.operators.registry import register
from kimi_ops.operators.tensors import dense_rows


def _check_maps(op: str, row_map: Tensor, source: Tensor, rows: tuple[str, Tensor]) -> None:
    """The operators are public too: whatever could lead outside of memory is refused here."""
    for name, ids in (("row_map", row_map), ("source", source)):
        _check.dtype(op, name, ids, (torch.int32,))
        _check.same_device(op, name, ids, *rows)
    _check.shape(op, "row_map", row_map, ("T", "K"))
    _check.shape(op, "source", source, ("cap",))


# ---- plan


def _plan_implementation(
    indices: Tensor, num_experts: int, align: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check.dtype("permute_plan", "indices", indices, (torch.int32,))
    _check.shape("permute_plan", "indices", indices, ("T", "K"))
    tokens, k = indices.shape
    indices = indices.contiguous()
    outputs = _plan_outputs(indices, num_experts, align)
    sizes = (tokens, k, num_experts, align)
    size = _native.workspace_bytes("permute_plan", indices, *sizes)
    workspace = indices.new_empty((size,), dtype=torch.uint8)
    addresses = [output.data_ptr() for output in outputs]
    _native.call(
        "permute_plan", indices, indices.data_ptr(), *addresses, workspace.data_ptr(), *sizes
    )
    return outputs


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


plan = register(
    "permute_plan(Tensor indices, int num_experts, int align) -> (Tensor, Tensor, Tensor, Tensor)",
    _plan_implementation,
    _plan_outputs,
)

# ---- permute: its backward is unpermute without weights


def _permute_implementation(x: Tensor, row_map: Tensor, source: Tensor) -> Tensor:
    _check_maps("permute", row_map, source, ("x", x))
    _check.shape("permute", "x", x, (row_map.shape[0], "H"))
    x, row_map, source = dense_rows(x), row_map.contiguous(), source.contiguous()
    y = _permute_output(x, row_map, source)
    size = x.element_size()
    _native.call(
        "permute", x, x.data_ptr(), row_map.data_ptr(), source.data_ptr(), y.data_ptr(),
        x.shape[0], y.shape[0], x.shape[1] * size, x.stride(0) * size, row_map.shape[1],
    )  # fmt: skip
    return y


def _permute_output(x: Tensor, row_map: Tensor, source: Tensor) -> Tensor:
    return x.new_empty((source.shape[0], x.shape[1]))


def _permute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _permute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    row_map, source = ctx.saved_tensors
    return unpermute(dy, row_map, source, None), None, None


permute = register(
    "permute(Tensor x, Tensor row_map, Tensor source) -> Tensor",
    _permute_implementation,
    _permute_output,
    _permute_context,
    _permute_backward,
)

# ---- unpermute: its backward is permute, scaled, with a dot product beside it


def _unpermute_implementation(
    y: Tensor, row_map: Tensor, source: Tensor, weights: Tensor | None
) -> Tensor:
    _check_maps("unpermute", row_map, source, ("y", y))
    _check.dtype("unpermute", "y", y, tuple(_native.DTYPES))
    _check.shape("unpermute", "y", y, (source.shape[0], "H"))
    if weights is not None:
        _check.dtype("unpermute", "weights", weights, (torch.float32,))
        _check.shape("unpermute", "weights", weights, tuple(row_map.shape))
    y, row_map = dense_rows(y), row_map.contiguous()
    weights = None if weights is None else weights.contiguous()
    x = _unpermute_output(y, row_map)
    _native.call(
        "unpermute", y, y.data_ptr(), row_map.data_ptr(), _native.address(weights), x.data_ptr(),
        x.shape[0], y.shape[1], y.stride(0), row_map.shape[1], _native.DTYPES[y.dtype],
    )  # fmt: skip
    return x


def _unpermute_output(y: Tensor, row_map: Tensor, *_: Any) -> Tensor:
    return y.new_empty((row_map.shape[0], y.shape[1]))


def _unpermute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, row_map, source, weights = inputs
    ctx.save_for_backward(None if weights is None else y, row_map, source, weights)


def _unpermute_backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    y, row_map, source, weights = ctx.saved_tensors
    if weights is None:
        return permute(dx, row_map, source), None, None, None
    grad_y, grad_weights = unpermute_gradients(dx, y, row_map, source, weights)
    return grad_y, None, None, grad_weights


def _gradients_implementation(
    dx: Tensor, y: Tensor, row_map: Tensor, source: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    op = "unpermute_backward"
    _check_maps(op, row_map, source, ("y", y))
    _check.dtype(op, "y", y, tuple(_native.DTYPES))
    _check.shape(op, "y", y, (source.shape[0], "H"))
    _check.dtype(op, "grad_x", dx, (y.dtype,))
    _check.shape(op, "grad_x", dx, (row_map.shape[0], y.shape[1]))
    _check.dtype(op, "weights", weights, (torch.float32,))
    _check.shape(op, "weights", weights, tuple(row_map.shape))
    dx, y = dense_rows(dx), dense_rows(y)
    row_map, source, weights = row_map.contiguous(), source.contiguous(), weights.contiguous()
    grad_y, grad_weights = _gradients_outputs(dx, y, row_map, source, weights)
    _native.call(
        "unpermute_backward", y, dx.data_ptr(), y.data_ptr(), row_map.data_ptr(),
        source.data_ptr(), weights.data_ptr(), grad_y.data_ptr(), grad_weights.data_ptr(),
        dx.shape[0], y.shape[0], y.shape[1], dx.stride(0), y.stride(0), row_map.shape[1],
        _native.DTYPES[y.dtype],
    )  # fmt: skip
    return grad_y, grad_weights


def _gradients_outputs(
    dx: Tensor, y: Tensor, row_map: Tensor, source: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


unpermute_gradients = register(
    "unpermute_backward(Tensor grad_x, Tensor y, Tensor row_map, Tensor source, Tensor weights) "
    "-> (Tensor, Tensor)",
    _gradients_implementation,
    _gradients_outputs,
)
unpermute = register(
    "unpermute(Tensor y, Tensor row_map, Tensor source, Tensor? weights) -> Tensor",
    _unpermute_implementation,
    _unpermute_output,
    _unpermute_context,
    _unpermute_backward,
)

# ---- sort_chunks: its backward is its inverse


def _sort_chunks_implementation(
    x: Tensor, split_sizes: Tensor, order: Tensor, inverse: bool
) -> Tensor:
    op = "sort_chunks"
    _check.shape(op, "x", x, ("R", "H"))
    for name, ids in (("split_sizes", split_sizes), ("order", order)):
        _check.dtype(op, name, ids, (torch.int32,))
        _check.shape(op, name, ids, (split_sizes.numel(),))
        _check.same_device(op, name, ids, "x", x)
    x, split_sizes, order = dense_rows(x), split_sizes.contiguous(), order.contiguous()
    y = x.new_empty(x.shape)
    size = x.element_size()
    _native.call(
        "sort_chunks", x, x.data_ptr(), split_sizes.data_ptr(), order.data_ptr(), y.data_ptr(),
        x.shape[0], x.shape[1] * size, x.stride(0) * size, order.shape[0], inverse,
    )  # fmt: skip
    return y


def _sort_chunks_output(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _sort_chunks_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, split_sizes, order, ctx.inverse = inputs
    ctx.save_for_backward(split_sizes, order)


def _sort_chunks_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    split_sizes, order = ctx.saved_tensors
    return sort_chunks(dy, split_sizes, order, not ctx.inverse), None, None, None


sort_chunks = register(
    "sort_chunks(Tensor x, Tensor split_sizes, Tensor order, bool inverse) -> Tensor",
    _sort_chunks_implementation,
    _sort_chunks_output,
    _sort_chunks_context,
    _sort_chunks_backward,
)
