# SPDX-License-Identifier: MIT
from typing import Any

import torch
from torch import Tensor

from kimi_ops.operators.registry import Operator


def _outputs(logits: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    return (
        logits.new_empty((tokens, k), dtype=torch.float32),
        logits.new_empty((tokens, k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
    )


def _given_outputs(logits: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logits, ids.shape[1])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.score_function, *_, ctx.renormalize, ctx.scaling_factor, _, _ = inputs
    _save(ctx, len(inputs), logits, output)


def _given_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.score_function, ctx.renormalize, ctx.scaling_factor, _ = inputs
    _save(ctx, len(inputs), logits, output)


def _save(ctx: Any, inputs: int, logits: Tensor, output: tuple[Tensor, ...]) -> None:
    ctx.others = (None,) * (inputs - 1)
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_weights: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    logits, indices = ctx.saved_tensors
    grad = topk_gate_backward(
        grad_weights, logits, indices, ctx.score_function, ctx.renormalize, ctx.scaling_factor
    )
    return grad, *ctx.others


def like_logits(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _planned_outputs(logits: Tensor, k: int, *_: Any) -> tuple[Tensor, ...]:
    gate = _outputs(logits, k)
    pairs = gate[1].new_empty((logits.shape[0] * k,))
    return *gate, gate[1].new_empty(gate[1].shape), pairs, gate[2].new_empty(gate[2].shape)


topk_gate_backward = Operator(
    "topk_gate_backward(Tensor grad_weights, Tensor logits, Tensor indices, str score_function, "
    "bool renormalize, float scaling_factor) -> Tensor",
    like_logits,
)
topk_gate = Operator(
    "topk_gate(Tensor logits, int k, str score_function, Tensor? expert_bias, int num_groups, "
    "int topk_groups, int group_score_topk, bool renormalize, float scaling_factor, "
    "Tensor? valid, str select) -> (Tensor, Tensor, Tensor)",
    _outputs,
    _context,
    _backward,
)
topk_gate_given = Operator(
    "topk_gate_given(Tensor logits, Tensor ids, str score_function, bool renormalize, "
    "float scaling_factor, Tensor? valid) -> (Tensor, Tensor, Tensor)",
    _given_outputs,
    _given_context,
    _backward,
)
gate_plan = Operator(
    "gate_plan(Tensor logits, int k, str score_function, Tensor? expert_bias, int num_groups, "
    "int topk_groups, int group_score_topk, bool renormalize, float scaling_factor, "
    "Tensor? valid, str select) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _planned_outputs,
    _context,
    _backward,
)
