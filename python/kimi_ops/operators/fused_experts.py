# SPDX-License-Identifier: MIT
"""The operators behind `kimi_ops.fused_experts`: native calls, fake tensors, gradients."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.operators.grouped_gemm import STORAGES
from kimi_ops.operators.registry import register
from kimi_ops.operators.tensors import dense_rows, huge_pages, workspace

ACTIVATIONS = {"silu": 0, "gelu": 1, "situ": 2}  # kimi_activation
Weights = tuple[int, int, int, int, int, int]


def _check_arguments(
    op: str, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor,
    source: Tensor, offsets: Tensor, activation: str,
) -> None:  # fmt: skip
    _check.dtype(op, "x", x, tuple(_native.DTYPES))
    _check.shape(op, "x", x, ("T", "H"), "flatten the batch")
    tokens, hidden = x.shape
    for name, matrices in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        _check.dtype(op, name, matrices, (x.dtype, torch.float8_e4m3fn, torch.int32))
        _check.same_device(op, name, matrices, "x", x)
    experts, width = w_gate_up.shape[0], w_gate_up.shape[1] // 2
    _check.shape(op, "w_gate_up", w_gate_up, (experts, 2 * width, _stored(w_gate_up, hidden)))
    _check.shape(op, "w_down", w_down, (experts, hidden, _stored(w_down, width)))
    _check.dtype(op, "weights", weights, (torch.float32,))
    _check.shape(op, "weights", weights, (tokens, "K"))
    _check.same_device(op, "weights", weights, "x", x)
    pairs = tokens * weights.shape[1]
    for name, ids, shape in (
        ("row_map", row_map, tuple(weights.shape)), ("source", source, (pairs,)),
        ("offsets", offsets, (experts,)),
    ):  # fmt: skip
        _check.dtype(op, name, ids, (torch.int32,))
        _check.shape(op, name, ids, shape)
        _check.same_device(op, name, ids, "x", x)
    _check.choice(op, "activation", activation, tuple(ACTIVATIONS))


def _check_scale(op: str, name: str, matrices: Tensor, scale: Tensor | None, columns: int) -> None:
    """The scale of quantised matrices [E, rows, columns]; None beside floats."""
    if matrices.dtype in _native.DTYPES:
        return
    if scale is None or not matrices.is_contiguous() or not scale.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected contiguous data and scale of a quantised weight, got "
            f"{'none' if scale is None else scale.stride()}; pass both as they were quantised"
        )
    packed = matrices.dtype == torch.int32
    rows = matrices.shape[1]
    grid = (rows, -(-columns // 32)) if packed else (-(-rows // 128), -(-columns // 128))
    _check.dtype(op, f"{name} scale", scale, (torch.bfloat16 if packed else torch.float32,))
    _check.shape(op, f"{name} scale", scale, (matrices.shape[0], *grid))
    _check.same_device(op, f"{name} scale", scale, name, matrices)


def _stored(matrices: Tensor, columns: int) -> int:
    """The last size of [E, rows, columns] as stored: int4 packs eight to a word."""
    return -(-columns // 8) if matrices.dtype == torch.int32 else columns


def _describe(matrices: Tensor, scale: Tensor | None) -> Weights:
    nibbles = 8 if matrices.dtype == torch.int32 else 1
    strides = (matrices.stride(0) * nibbles, matrices.stride(1) * nibbles, matrices.stride(2))
    return (
        matrices.data_ptr(), _native.address(scale), *strides, STORAGES[matrices.dtype],
    )  # fmt: skip


# ---- forward


def _implementation(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor, source: Tensor,
    offsets: Tensor, gate_up_scale: Tensor | None, down_scale: Tensor | None, activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, gate_up = _outputs(
        x, w_gate_up, w_down, weights, row_map, source, offsets, gate_up_scale, down_scale,
        activation, save,
    )  # fmt: skip
    huge_pages(gate_up)
    x, weights = dense_rows(x), weights.contiguous()
    row_map, source, offsets = row_map.contiguous(), source.contiguous(), offsets.contiguous()
    experts, dtype = w_gate_up.shape[0], _native.DTYPES[x.dtype]
    sizes = (x.shape[0], x.shape[1], w_gate_up.shape[1] // 2)
    k = weights.shape[1]
    scratch = workspace("fused_experts", x, *sizes, experts, k, dtype)
    _native.call(
        "fused_experts", x, x.data_ptr(), _describe(w_gate_up, gate_up_scale),
        _describe(w_down, down_scale), weights.data_ptr(), row_map.data_ptr(), source.data_ptr(),
        offsets.data_ptr(), y.data_ptr(), gate_up.data_ptr() if save else 0, scratch.data_ptr(),
        *sizes, x.stride(0), experts, k, dtype, ACTIVATIONS[activation],
    )  # fmt: skip
    return y, gate_up


def _outputs(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor, source: Tensor,
    offsets: Tensor, gate_up_scale: Tensor | None, down_scale: Tensor | None, activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "fused_experts"
    _check_arguments(op, x, w_gate_up, w_down, weights, row_map, source, offsets, activation)
    _check_scale(op, "w_gate_up", w_gate_up, gate_up_scale, x.shape[1])
    _check_scale(op, "w_down", w_down, down_scale, w_gate_up.shape[1] // 2)
    rows = source.shape[0] if save else 0
    return x.new_empty(x.shape), x.new_empty((rows, w_gate_up.shape[1]))


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_gate_up, w_down, weights, row_map, source, offsets = inputs[:7]
    ctx.activation, saved = inputs[9], inputs[10]
    ctx.save_for_backward(
        x, w_gate_up, w_down, weights, row_map, source, offsets, output[1] if saved else None
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nobody reads a gradient of gate_up


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    wanted = [bool(need) for need in ctx.needs_input_grad[:4]]
    gradients = backward(dy, *ctx.saved_tensors, ctx.activation, wanted)
    kept = [g if need else None for g, need in zip(gradients, wanted, strict=True)]
    return *kept, *[None] * 7


# ---- backward


def _backward_implementation(
    dy: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor,
    source: Tensor, offsets: Tensor, gate_up: Tensor | None, activation: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _backward_outputs(
        dy, x, w_gate_up, w_down, weights, row_map, source, offsets, gate_up, activation, wanted
    )
    dx, grad_gate_up, grad_down, grad_weights = (
        huge_pages(output).data_ptr() if want else 0
        for output, want in zip(outputs, wanted, strict=True)
    )
    dy, x, weights = dense_rows(dy), dense_rows(x), weights.contiguous()
    row_map, source, offsets = row_map.contiguous(), source.contiguous(), offsets.contiguous()
    gate_up = None if gate_up is None else gate_up.contiguous()
    experts, dtype = w_gate_up.shape[0], _native.DTYPES[x.dtype]
    sizes = (x.shape[0], x.shape[1], w_gate_up.shape[1] // 2)
    k = weights.shape[1]
    saved = _native.address(gate_up)
    scratch = workspace("fused_experts_backward", x, saved, *sizes, experts, k, dtype)
    _native.call(
        "fused_experts_backward", x, dy.data_ptr(), x.data_ptr(), _describe(w_gate_up, None),
        _describe(w_down, None), weights.data_ptr(), row_map.data_ptr(), source.data_ptr(),
        offsets.data_ptr(), saved, dx, grad_gate_up, grad_down, grad_weights, scratch.data_ptr(),
        *sizes, dy.stride(0), x.stride(0), experts, k, dtype, ACTIVATIONS[activation],
    )  # fmt: skip
    return outputs


def _backward_outputs(
    dy: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, row_map: Tensor,
    source: Tensor, offsets: Tensor, gate_up: Tensor | None, activation: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "fused_experts_backward"
    _check_arguments(op, x, w_gate_up, w_down, weights, row_map, source, offsets, activation)
    for name, matrices in (("w_gate_up", w_gate_up), ("w_down", w_down), ("dy", dy)):
        _check.dtype(op, name, matrices, (x.dtype,))
    _check.shape(op, "dy", dy, tuple(x.shape))
    if gate_up is not None:
        _check.dtype(op, "gate_up", gate_up, (x.dtype,))
        _check.shape(op, "gate_up", gate_up, (source.shape[0], w_gate_up.shape[1]))
    if len(wanted) != 4:
        raise ValueError(
            f"{op}: wanted: expected 4 truth values, got {len(wanted)}; pass one for each of x, "
            "w_gate_up, w_down, weights"
        )
    shapes = (x.shape, w_gate_up.shape, w_down.shape, weights.shape)
    dx, grad_gate_up, grad_down, grad_weights = (
        like.new_empty(shape if want else (0,))
        for like, shape, want in zip((x, w_gate_up, w_down, weights), shapes, wanted, strict=True)
    )
    return dx, grad_gate_up, grad_down, grad_weights


backward = register(
    "fused_experts_backward(Tensor dy, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, "
    "Tensor row_map, Tensor source, Tensor offsets, Tensor? gate_up, str activation, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_outputs,
)
forward = register(
    "fused_experts(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor row_map, "
    "Tensor source, Tensor offsets, Tensor? gate_up_scale, Tensor? down_scale, str activation, "
    "bool save) -> (Tensor, Tensor)",
    _implementation,
    _outputs,
    _context,
    _backward,
)
