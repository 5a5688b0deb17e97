# SPDX-License-Identifier: MIT
"""Gradients of the ops, each beside its op: NumPy has no autograd."""

from typing import Any

from kimi_ops.activations import Activation, ActivationName, of
from kimi_ops.arrays.door import Plan
from kimi_ops.choices import ScoreFunction
from kimi_ops.numpy.door import OPS


def topk_gate_backward(
    grad_weights: Any,
    logits: Any,
    indices: Any,
    *,
    score_function: ScoreFunction = "sigmoid",
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> Any:
    """The gradient of `topk_gate`'s logits [T, E] from that of its weights [T, K]."""
    options = score_function, bool(renormalize), float(scaling_factor)
    return OPS.run("topk_gate_backward", grad_weights, logits, OPS.ids(indices), *options)


def sequence_balance_loss_backward(
    grad_loss: Any,
    logits: Any,
    indices: Any,
    *,
    num_sequences: int = 1,
    offsets: Any = None,
    valid: Any = None,
    tokens_per_expert: Any = None,
    sequence_tokens: Any = None,
    score_function: ScoreFunction = "sigmoid",
    coefficient: float = 1e-4,
) -> Any:
    """The gradient of the logits, from that of the loss []; with the arguments of the loss."""
    op = "sequence_balance_loss_backward"
    counts = OPS.counted(
        op, logits, indices, num_sequences, offsets, valid, tokens_per_expert, sequence_tokens
    )
    return OPS.run(op, grad_loss, logits, *counts, score_function, float(coefficient))


def z_loss_backward(
    grad_loss: Any, logits: Any, *, coefficient: float = 1e-3, valid: Any = None
) -> Any:
    """The gradient of the logits, from that of the loss []."""
    _, log_sum_exp, tokens = OPS.run("z_loss", logits, float(coefficient), valid)
    return OPS.run("z_loss_backward", grad_loss, logits, log_sum_exp, tokens, float(coefficient))


def unpermute_backward(grad_x: Any, y: Any, plan: Plan, weights: Any) -> tuple[Any, Any]:
    """The gradients of `unpermute`'s rows and weights."""
    weights = OPS.as_weights(weights)
    return OPS.run("unpermute_backward", grad_x, y, plan.row_map, plan.source, weights)


def fused_experts_planned(
    x: Any, w_gate_up: Any, w_down: Any, weights: Any, plan: Plan, *, b_gate_up: Any = None,
    b_down: Any = None, activation: ActivationName | Activation = "silu",
    weights_first: bool = False, save: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`fused_experts` of a plan; with `save` also [g; u] [R, 2F] for the backward, else [0, 2F]."""
    return OPS.run(
        "fused_experts_planned", x, w_gate_up, w_down, OPS.as_weights(weights), plan.row_map,
        plan.source, plan.offsets, None, None, b_gate_up, b_down, *_named(activation),
        weights_first, save,
    )  # fmt: skip


def fused_experts_backward(
    dy: Any, x: Any, w_gate_up: Any, w_down: Any, weights: Any, plan: Plan, *, gate_up: Any = None,
    b_gate_up: Any = None, b_down: Any = None, activation: ActivationName | Activation = "silu",
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of x, w_gate_up, w_down and weights, then of the biases that are given; of what
    `fused_experts` computes as a whole."""
    biases = b_gate_up, b_down
    gradients = OPS.run(
        "fused_experts_backward", dy, x, w_gate_up, w_down, OPS.as_weights(weights), plan.row_map,
        plan.source, plan.offsets, gate_up, *biases, *_named(activation),
        [True] * 4 + [bias is not None for bias in biases],
    )  # fmt: skip
    given = [g for g, bias in zip(gradients[4:], biases, strict=True) if bias is not None]
    return *gradients[:4], *given


def _named(activation: ActivationName | Activation) -> tuple[str, list[float]]:
    form = of(activation)
    if not form.gated:
        raise ValueError(
            f"fused_experts: activation: expected one with a gate, got {form}; compose its gradient"
        )
    return form.name, list(form.numbers)
