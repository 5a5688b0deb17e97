# SPDX-License-Identifier: MIT
"""Load balancing of the router: the bias rules and the auxiliary losses."""

from typing import Any

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.moe.topk_gate import MAX_EXPERTS, SCORE_FUNCTIONS
from kimi_ops.operators.registry import register
from kimi_ops.operators.tensors import dense_rows


def update_expert_bias_(
    bias: Tensor, tokens_per_expert: Tensor, rate: float, centered: bool = False
) -> Tensor:
    r"""Move the selection bias of every expert one step towards balance, in place.

    .. math:: b_e \mathrel{+}= \text{rate} \cdot d_e, \qquad
        d_e = \operatorname{sign}(\bar n - n_e)

    with n the tokens of each expert over the whole batch of the step. `centered` subtracts the mean
    of d, so that the mean of the bias does not drift.

    Parameters
    ----------
    bias : Tensor [E] float32
    tokens_per_expert : Tensor [E], int32 or int64
        Counts summed over micro-batches and ranks; compared with their mean in integers, exactly.
    rate : float
        Step, 0.001 in DeepSeek-V3 and Moonlight.
    centered : bool
        False: DeepSeek-V3's rule (arXiv 2412.19437, section 2.1.2). True: Moonlight's
        (arXiv 2502.16982, appendix C).

    Returns
    -------
    Tensor
        `bias`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device; the bias is untouched.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> bias = torch.zeros(3)
    >>> loads = torch.tensor([4, 1, 1])
    >>> [round(b, 3) for b in kimi_ops.update_expert_bias_(bias, loads, 0.001).tolist()]
    [-0.001, 0.001, 0.001]
    """
    op = "update_expert_bias_"
    _check.tensor(op, "bias", bias)
    _check.dtype(op, "bias", bias, (torch.float32,))
    _check.shape(op, "bias", bias, ("E",))
    _check.tensor(op, "tokens_per_expert", tokens_per_expert)
    _check.dtype(op, "tokens_per_expert", tokens_per_expert, (torch.int32, torch.int64))
    _check.shape(op, "tokens_per_expert", tokens_per_expert, (bias.shape[0],))
    _check.same_device(op, "tokens_per_expert", tokens_per_expert, "bias", bias)
    with torch.no_grad():
        _update_expert_bias(bias, tokens_per_expert, rate, centered)
    return bias


def sequence_balance_loss(
    logits: Tensor,
    indices: Tensor,
    *,
    num_sequences: int = 1,
    score_function: str = "sigmoid",
    coefficient: float = 1e-4,
) -> Tensor:
    r"""Sequence-wise auxiliary loss, averaged over the sequences.

    .. math::
        L = \alpha \sum_e f_e P_e, \quad
        f_e = \frac{E}{K S} \sum_t \mathbb 1[e \in I_t], \quad
        P_e = \frac{1}{S} \sum_t \frac{s_{te}}{\sum_i s_{ti}}

    f counts the ids that were chosen (with the bias, if there is one) and gets no gradient.

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
        Router logits; T = num_sequences * S, the tokens of a sequence side by side; rows may be
        strided; E at most 1024. NaN counts as -inf and scores 0.
    indices : Tensor [T, K] int32
        Chosen experts; -1, like any id outside of 0..E-1, counts for none.
    num_sequences : int
    score_function : {"sigmoid", "softmax", "sqrtsoftplus"}
    coefficient : float
        The weight alpha, 0.0001 in DeepSeek-V3.

    Returns
    -------
    Tensor
        Scalar float32, once differentiable in `logits`. The same bits on every engine.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device, or T not a multiple of `num_sequences`.

    References
    ----------
    DeepSeek-V3, arXiv 2412.19437, eq. 17-20.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> logits = torch.zeros(8, 4)
    >>> gate = kimi_ops.topk_gate(logits, k=4)
    >>> round(kimi_ops.sequence_balance_loss(logits, gate.indices, coefficient=1.0).item(), 6)
    1.0
    """
    op = "sequence_balance_loss"
    _check.tensor(op, "logits", logits)
    _check.dtype(op, "logits", logits, tuple(_native.DTYPES))
    _check.shape(op, "logits", logits, ("T", "E"))
    _check.tensor(op, "indices", indices)
    _check.dtype(op, "indices", indices, (torch.int32,))
    _check.shape(op, "indices", indices, (logits.shape[0], "K"))
    _check.same_device(op, "indices", indices, "logits", logits)
    _check.between(op, "logits.shape[1]", logits.shape[1], 1, MAX_EXPERTS)
    if indices.shape[1] < 1:
        raise ValueError(f"{op}: indices: expected at least one id a token, got shape [T, 0]")
    _check.choice(op, "score_function", score_function, tuple(SCORE_FUNCTIONS))
    if num_sequences < 1 or logits.shape[0] % num_sequences:
        raise ValueError(
            f"{op}: num_sequences: expected a divisor of the {logits.shape[0]} tokens, "
            f"got {num_sequences}"
        )
    return _balance_loss(logits, indices, num_sequences, score_function, coefficient)[0]


def z_loss(logits: Tensor, *, coefficient: float = 1e-3, valid: Tensor | None = None) -> Tensor:
    r"""Router z-loss: keeps the logits small.

    .. math:: L = \frac{\text{coefficient}}{T} \sum_t \Bigl(\log \sum_e e^{z_{te}}\Bigr)^2

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
        Rows may be strided; E at most 1024. NaN counts as -inf, +inf as the largest finite number;
        a row of nothing but -inf makes the loss inf and gets no gradient.
    coefficient : float
        0.001 in ST-MoE.
    valid : Tensor [T] bool, optional
        False leaves the token out of the sum and of T.

    Returns
    -------
    Tensor
        Scalar float32, once differentiable in `logits`; 0 for no tokens. The same bits on every
        engine.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device.

    References
    ----------
    ST-MoE, arXiv 2202.08906, eq. 5.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> round(kimi_ops.z_loss(torch.zeros(2, 4), coefficient=1.0).item(), 4)  # log(4) ** 2
    1.9218
    """
    op = "z_loss"
    _check.tensor(op, "logits", logits)
    _check.dtype(op, "logits", logits, tuple(_native.DTYPES))
    _check.shape(op, "logits", logits, ("T", "E"))
    _check.between(op, "logits.shape[1]", logits.shape[1], 1, MAX_EXPERTS)
    if valid is not None:
        _check.tensor(op, "valid", valid)
        _check.dtype(op, "valid", valid, (torch.bool,))
        _check.shape(op, "valid", valid, (logits.shape[0],))
        _check.same_device(op, "valid", valid, "logits", logits)
    return _z_loss(logits, coefficient, valid)[0]


def _update(bias: Tensor, tokens_per_expert: Tensor, rate: float, centered: bool) -> None:
    dense, counts = bias.contiguous(), tokens_per_expert.contiguous()
    _native.call(
        "update_expert_bias", dense, dense.data_ptr(), counts.data_ptr(), dense.shape[0], rate,
        counts.dtype == torch.int64, centered,
    )  # fmt: skip
    if dense is bias:
        torch.autograd.graph.increment_version(bias)
    else:
        bias.copy_(dense)


def _nothing(bias: Tensor, tokens_per_expert: Tensor, rate: float, centered: bool) -> None:
    return None


def _loss_forward(
    logits: Tensor, indices: Tensor, num_sequences: int, score_function: str, coefficient: float
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    logits, indices = dense_rows(logits), indices.contiguous()
    loss, counts = _loss_outputs(logits, indices, num_sequences)
    size = _native._C.sequence_balance_loss_workspace_bytes(tokens, num_sequences, experts)
    workspace = logits.new_empty((size,), dtype=torch.uint8)
    _native.call(
        "sequence_balance_loss", logits, logits.data_ptr(), indices.data_ptr(), loss.data_ptr(),
        counts.data_ptr(), workspace.data_ptr(), tokens, num_sequences, logits.stride(0), experts,
        indices.shape[1], coefficient, _native.DTYPES[logits.dtype],
        SCORE_FUNCTIONS[score_function],
    )  # fmt: skip
    return loss, counts


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


def _loss_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, counts = ctx.saved_tensors
    grad = _balance_loss_backward(
        grad_loss, logits, counts, ctx.top_k, ctx.score_function, ctx.coefficient
    )
    return grad, None, None, None, None


def _loss_backward_implementation(
    grad_loss: Tensor, logits: Tensor, tokens_per_expert: Tensor, top_k: int, score_function: str,
    coefficient: float,
) -> Tensor:  # fmt: skip
    tokens, experts = logits.shape
    logits, counts = dense_rows(logits), tokens_per_expert.contiguous()
    grad = _like_rows(grad_loss, logits)
    _native.call(
        "sequence_balance_loss_backward", logits, grad_loss.data_ptr(), logits.data_ptr(),
        counts.data_ptr(), grad.data_ptr(), tokens, counts.shape[0], logits.stride(0), experts,
        top_k, coefficient, _native.DTYPES[logits.dtype], SCORE_FUNCTIONS[score_function],
    )  # fmt: skip
    return grad


def _like_rows(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _z_forward(
    logits: Tensor, coefficient: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    logits = dense_rows(logits)
    mask = None if valid is None else valid.contiguous()
    loss, log_sum_exp, valid_tokens = _z_outputs(logits)
    workspace = logits.new_empty((_native._C.z_loss_workspace_bytes(tokens),), dtype=torch.uint8)
    _native.call(
        "z_loss", logits, logits.data_ptr(), _native.address(mask), loss.data_ptr(),
        log_sum_exp.data_ptr(), valid_tokens.data_ptr(), workspace.data_ptr(), tokens,
        logits.stride(0), experts, coefficient, _native.DTYPES[logits.dtype],
    )  # fmt: skip
    return loss, log_sum_exp, valid_tokens


def _z_outputs(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((logits.shape[0],), dtype=torch.float32),
        logits.new_empty((1,), dtype=torch.int32),
    )


def _z_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.coefficient, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1], output[2])


def _z_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _z_loss_backward(grad_loss, *ctx.saved_tensors, ctx.coefficient), None, None


def _z_backward_implementation(
    grad_loss: Tensor, logits: Tensor, log_sum_exp: Tensor, valid_tokens: Tensor, coefficient: float
) -> Tensor:
    tokens, experts = logits.shape
    logits, log_sum_exp = dense_rows(logits), log_sum_exp.contiguous()
    grad = _like_rows(grad_loss, logits)
    _native.call(
        "z_loss_backward", logits, grad_loss.data_ptr(), logits.data_ptr(), log_sum_exp.data_ptr(),
        valid_tokens.data_ptr(), grad.data_ptr(), tokens, logits.stride(0), experts, coefficient,
        _native.DTYPES[logits.dtype],
    )  # fmt: skip
    return grad


_update_expert_bias = register(
    "update_expert_bias_(Tensor(a!) bias, Tensor tokens_per_expert, float rate, bool centered) "
    "-> ()",
    _update,
    _nothing,
)
_balance_loss_backward = register(
    "sequence_balance_loss_backward(Tensor grad_loss, Tensor logits, Tensor tokens_per_expert, "
    "int top_k, str score_function, float coefficient) -> Tensor",
    _loss_backward_implementation,
    _like_rows,
)
_balance_loss = register(
    "sequence_balance_loss(Tensor logits, Tensor indices, SymInt num_sequences, "
    "str score_function, float coefficient) -> (Tensor, Tensor)",
    _loss_forward,
    _loss_outputs,
    _loss_context,
    _loss_backward,
)
_z_loss_backward = register(
    "z_loss_backward(Tensor grad_loss, Tensor logits, Tensor log_sum_exp, Tensor valid_tokens, "
    "float coefficient) -> Tensor",
    _z_backward_implementation,
    _like_rows,
)
_z_loss = register(
    "z_loss(Tensor logits, float coefficient, Tensor? valid) -> (Tensor, Tensor, Tensor)",
    _z_forward,
    _z_outputs,
    _z_context,
    _z_backward,
)
