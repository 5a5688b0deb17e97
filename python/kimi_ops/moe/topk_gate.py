# SPDX-License-Identifier: MIT
"""Top-k gating: router scores, selection of the experts, weights and expert counts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.operators.registry import register
from kimi_ops.operators.tensors import dense_rows

SCORE_FUNCTIONS = {"sigmoid": 0, "softmax": 1, "sqrtsoftplus": 2}  # kimi_score_function
MAX_EXPERTS = 1024
MAX_K = 32


class TopkGate(NamedTuple):
    """What :func:`topk_gate` returns."""

    weights: Tensor  #: [T, K] float32
    indices: Tensor  #: [T, K] int32, best first; -1 dropped
    tokens_per_expert: Tensor  #: [E] int32


def topk_gate(
    logits: Tensor,
    k: int,
    *,
    score_function: str = "sigmoid",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score_topk: int = 2,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    valid: Tensor | None = None,
) -> TopkGate:
    r"""Choose `k` of E experts for every token, and weigh them.

    With :math:`s = \mathrm{score}(z)` in fp32, whatever the dtype of the logits z:

    .. math::
        I_t = \operatorname{topk}_e(s_{te} + b_e), \qquad
        w_{tj} = \frac{s_{t I_{tj}}}{\sum_i s_{t I_{ti}} + 10^{-20}} \cdot \text{scaling\_factor}

    The bias b selects and never weighs. Equal scores go to the lower id; a NaN logit counts as -inf
    and scores 0, so the ids of a row are always unique and in range. The same input gives the same
    bits on every engine.

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
        Router logits; rows may be strided. E at most 1024.
    k : int
        Experts a token, at most 32.
    score_function : {"sigmoid", "softmax", "sqrtsoftplus"}
        ``softmax`` is over all experts; with `renormalize` that equals a softmax over the chosen.
    expert_bias : Tensor [E] float32, optional
        Correction bias of auxiliary-loss-free balancing; gets no gradient.
    num_groups, topk_groups, group_score_topk : int
        Group-limited selection: E experts in `num_groups` equal runs; a group scores the sum of its
        `group_score_topk` best biased scores; only the `topk_groups` best groups take part.
    renormalize : bool
        Divide by the sum of the chosen scores.
    scaling_factor : float
        Factor on the weights (2.827 in Kimi K2).
    valid : Tensor [T] bool, optional
        False drops the token: ids -1, weights 0, not counted.

    Returns
    -------
    TopkGate
        ``weights`` [T, K] float32, ``indices`` [T, K] int32 in descending (biased) score,
        ``tokens_per_expert`` [E] int32.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong type, dtype, shape, device or range; nothing is launched.
    RuntimeError
        CUDA tensors in a build without CUDA kernels.

    Notes
    -----
    Differentiable in `logits` through the weights; ids are constants. Once differentiable.

    References
    ----------
    DeepSeek-V3, arXiv 2412.19437, eq. 12-16; Kimi K2, arXiv 2507.20534.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    >>> gate = kimi_ops.topk_gate(logits, k=2)
    >>> gate.indices.tolist(), gate.tokens_per_expert.tolist()
    ([[1, 2]], [0, 1, 1, 0])
    >>> round(gate.weights.sum().item(), 6)
    1.0
    """
    op = "topk_gate"
    _check.tensor(op, "logits", logits)
    weights, indices, tokens_per_expert = _topk_gate(
        logits, _check.integer(op, "k", k), score_function, expert_bias,
        _check.integer(op, "num_groups", num_groups),
        _check.integer(op, "topk_groups", topk_groups),
        _check.integer(op, "group_score_topk", group_score_topk),
        bool(renormalize), _check.number(op, "scaling_factor", scaling_factor), valid,
    )  # fmt: skip
    return TopkGate(weights, indices, tokens_per_expert)


def _check_arguments(
    logits: Tensor, k: int, score_function: str, expert_bias: Tensor | None, num_groups: int,
    topk_groups: int, group_score_topk: int, renormalize: bool, scaling_factor: float,
    valid: Tensor | None,
) -> None:  # fmt: skip
    op = "topk_gate"
    _check.dtype(op, "logits", logits, tuple(_native.DTYPES))
    _check.shape(op, "logits", logits, ("T", "E"), "flatten batch and sequence first")
    experts = logits.shape[1]
    _check.between(op, "logits.shape[1]", experts, 1, MAX_EXPERTS)
    _check.choice(op, "score_function", score_function, tuple(SCORE_FUNCTIONS))
    _check.between(op, "num_groups", num_groups, 1, experts)
    if experts % num_groups:
        raise ValueError(
            f"{op}: num_groups: expected a divisor of the {experts} experts, got {num_groups}"
        )
    size = experts // num_groups
    _check.between(op, "topk_groups", topk_groups, 1, num_groups)
    _check.between(op, "k", k, 1, min(MAX_K, topk_groups * size), _limit_of_k(topk_groups, size))
    if num_groups > 1:
        _check.between(op, "group_score_topk", group_score_topk, 1, size, " (experts of a group)")
    if expert_bias is not None:
        mend = "keep the bias in float32: bfloat16 cannot hold steps of 0.001"
        _check.dtype(op, "expert_bias", expert_bias, (torch.float32,), mend)
        _check.shape(op, "expert_bias", expert_bias, (experts,))
        _check.same_device(op, "expert_bias", expert_bias, "logits", logits)
    if valid is not None:
        _check.dtype(op, "valid", valid, (torch.bool,))
        _check.shape(op, "valid", valid, (logits.shape[0],))
        _check.same_device(op, "valid", valid, "logits", logits)


def _limit_of_k(topk_groups: int, size: int) -> str:
    return f" (at most {MAX_K}, and {topk_groups} group(s) of {size} experts take part)"


def _forward(
    logits: Tensor, k: int, score_function: str, expert_bias: Tensor | None, num_groups: int,
    topk_groups: int, group_score_topk: int, renormalize: bool, scaling_factor: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_arguments(
        logits, k, score_function, expert_bias, num_groups, topk_groups, group_score_topk,
        renormalize, scaling_factor, valid,
    )  # fmt: skip
    tokens, experts = logits.shape
    logits = dense_rows(logits)
    bias = None if expert_bias is None else expert_bias.contiguous()
    mask = None if valid is None else valid.contiguous()
    weights, indices, counts = _outputs(logits, k)
    _native.call(
        "topk_gate", logits, logits.data_ptr(), _native.address(bias), _native.address(mask),
        weights.data_ptr(), indices.data_ptr(), counts.data_ptr(), tokens, logits.stride(0),
        experts, k, num_groups, topk_groups, group_score_topk, renormalize, scaling_factor,
        _native.DTYPES[logits.dtype], SCORE_FUNCTIONS[score_function],
    )  # fmt: skip
    return weights, indices, counts


def _fake(logits: Tensor, k: int, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_arguments(logits, k, *options)
    return _outputs(logits, k)


def _outputs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    return (
        logits.new_empty((tokens, k), dtype=torch.float32),
        logits.new_empty((tokens, k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.score_function, *_, ctx.renormalize, ctx.scaling_factor, _ = inputs
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, grad_weights: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, indices = ctx.saved_tensors
    grad = _topk_gate_backward(
        grad_weights, logits, indices, ctx.score_function, ctx.renormalize, ctx.scaling_factor
    )
    return grad, *[None] * 9


def _backward_implementation(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, score_function: str, renormalize: bool,
    scaling_factor: float,
) -> Tensor:  # fmt: skip
    op = "topk_gate_backward"
    _check.dtype(op, "logits", logits, tuple(_native.DTYPES))
    _check.shape(op, "logits", logits, ("T", "E"))
    tokens, experts = logits.shape
    _check.dtype(op, "indices", indices, (torch.int32,))
    _check.shape(op, "indices", indices, (tokens, "K"))
    _check.dtype(op, "grad_weights", grad_weights, (torch.float32,))
    _check.shape(op, "grad_weights", grad_weights, tuple(indices.shape))
    logits = dense_rows(logits)
    grad = _like_rows(grad_weights, logits)
    grad_weights, indices = grad_weights.contiguous(), indices.contiguous()
    _native.call(
        "topk_gate_backward", logits, grad_weights.data_ptr(), logits.data_ptr(),
        indices.data_ptr(), grad.data_ptr(), tokens, logits.stride(0), experts, indices.shape[1],
        renormalize, scaling_factor, _native.DTYPES[logits.dtype], SCORE_FUNCTIONS[score_function],
    )  # fmt: skip
    return grad


def _like_rows(grad_weights: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_topk_gate_backward = register(
    "topk_gate_backward(Tensor grad_weights, Tensor logits, Tensor indices, str score_function, "
    "bool renormalize, float scaling_factor) -> Tensor",
    _backward_implementation,
    _like_rows,
)
_topk_gate = register(
    "topk_gate(Tensor logits, int k, str score_function, Tensor? expert_bias, int num_groups, "
    "int topk_groups, int group_score_topk, bool renormalize, float scaling_factor, "
    "Tensor? valid) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _backward,
)
