# SPDX-License-Identifier: MIT
from typing import Any

import torch
from torch import Tensor

from kimi_ops.operators.registry import Operator
from kimi_ops.operators.topk_gate import like_logits


def _nothing(*_: Any) -> None:
    return None


# ---- sequence_balance_loss: of counts that sequence_counts gives, here or on all ranks


def _counts(
    indices: Tensor, num_experts: int, num_sequences: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return (
        indices.new_empty((num_sequences, num_experts)),
        indices.new_empty((num_sequences,)),
    )


def _loss(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _loss_backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    grad = sequence_balance_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.rest)
    return grad, None, None, None, None, None, None, None


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
sequence_counts = Operator(
    "sequence_counts(Tensor indices, int num_experts, SymInt num_sequences, Tensor? offsets, "
    "Tensor? valid) -> (Tensor, Tensor)",
    _counts,
)
_OF_LOGITS = (
    "Tensor logits, Tensor tokens_per_expert, Tensor sequence_tokens, Tensor? offsets, "
    "Tensor? valid, int top_k, str score_function, float coefficient"
)
sequence_balance_loss_backward = Operator(
    f"sequence_balance_loss_backward(Tensor grad_loss, {_OF_LOGITS}) -> Tensor",
    like_logits,
)
sequence_balance_loss = Operator(
    f"sequence_balance_loss({_OF_LOGITS}) -> Tensor", _loss, _loss_context, _loss_backward
)
quantile_histogram_ = Operator(
    "quantile_histogram_(Tensor(a!) histogram, Tensor logits, Tensor cutoffs, Tensor bounds, "
    "str score_function, Tensor? valid) -> ()",
    _nothing,
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
