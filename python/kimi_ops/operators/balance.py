# SPDX-License-Identifier: MIT
from typing import Any

import torch
from torch import Tensor

from kimi_ops.operators.registry import Operator
from kimi_ops.operators.topk_gate import like_logits


def _nothing(*_: Any) -> None:
    return None


# ---- sequence_balance_loss: the second output are the counts of each sequence


def _loss_outputs(
    logits: Tensor, indices: Tensor, num_sequences: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((num_sequences, logits.shape[1]), dtype=torch.int32),
    )


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, indices, _, ctx.score_function, ctx.coefficient = inputs
    ctx.top_k = indices.shape[1]
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
    logits, counts = ctx.saved_tensors
    grad = sequence_balance_loss_backward(
        grad_loss, logits, counts, ctx.top_k, ctx.score_function, ctx.coefficient
    )
    return grad, None, None, None, None


# ---- z_loss: also the logarithms of the sums, and how many tokens count


def _z_outputs(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((logits.shape[0],), dtype=torch.float32),
        logits.new_empty((1,), dtype=torch.int32),
    )


def _z_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.coefficient, _ = inputs
    ctx.save_for_backward(logits, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _z_backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return z_loss_backward(grad_loss, *ctx.saved_tensors, ctx.coefficient), None, None


update_expert_bias_ = Operator(
    "update_expert_bias_(Tensor(a!) bias, Tensor tokens_per_expert, float rate, bool centered) "
    "-> ()",
    _nothing,
)
sequence_balance_loss_backward = Operator(
    "sequence_balance_loss_backward(Tensor grad_loss, Tensor logits, Tensor tokens_per_expert, "
    "int top_k, str score_function, float coefficient) -> Tensor",
    like_logits,
)
sequence_balance_loss = Operator(
    "sequence_balance_loss(Tensor logits, Tensor indices, SymInt num_sequences, "
    "str score_function, float coefficient) -> (Tensor, Tensor)",
    _loss_outputs,
    _loss_context,
    _loss_backward,
)
z_loss_backward = Operator(
    "z_loss_backward(Tensor grad_loss, Tensor logits, Tensor log_sum_exp, Tensor valid_tokens, "
    "float coefficient) -> Tensor",
    like_logits,
)
z_loss = Operator(
    "z_loss(Tensor logits, float coefficient, Tensor? valid) -> (Tensor, Tensor, Tensor)",
    _z_outputs,
    _z_context,
    _z_backward,
)
