# SPDX-License-Identifier: MIT
"""Load balancing of the router: the bias rules and the auxiliary losses."""

import torch
from torch import Tensor

from kimi_ops import _check, _native
from kimi_ops.reference import balance as reference
from kimi_ops.topk_gate import SCORE_FUNCTIONS


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
        Counts summed over micro-batches and ranks.
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
        return reference.update_expert_bias_(bias, tokens_per_expert, rate, centered)


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
        Router logits; T = num_sequences * S, the tokens of a sequence side by side.
    indices : Tensor [T, K] int32
        Chosen experts; -1 counts for none.
    num_sequences : int
    score_function : {"sigmoid", "softmax", "sqrtsoftplus"}
    coefficient : float
        The weight alpha, 0.0001 in DeepSeek-V3.

    Returns
    -------
    Tensor
        Scalar float32, differentiable in `logits`. Deterministic.

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
    _check.choice(op, "score_function", score_function, tuple(SCORE_FUNCTIONS))
    if num_sequences < 1 or logits.shape[0] % num_sequences:
        raise ValueError(
            f"{op}: num_sequences: expected a divisor of the {logits.shape[0]} tokens, "
            f"got {num_sequences}"
        )
    return reference.sequence_balance_loss(
        logits, indices, num_sequences, score_function, coefficient
    )


def z_loss(logits: Tensor, *, coefficient: float = 1e-3, valid: Tensor | None = None) -> Tensor:
    r"""Router z-loss: keeps the logits small.

    .. math:: L = \frac{\text{coefficient}}{T} \sum_t \Bigl(\log \sum_e e^{z_{te}}\Bigr)^2

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
    coefficient : float
        0.001 in ST-MoE.
    valid : Tensor [T] bool, optional
        False leaves the token out of the sum and of T.

    Returns
    -------
    Tensor
        Scalar float32, differentiable in `logits`; 0 for no tokens. Deterministic.

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
    if valid is not None:
        _check.tensor(op, "valid", valid)
        _check.dtype(op, "valid", valid, (torch.bool,))
        _check.shape(op, "valid", valid, (logits.shape[0],))
        _check.same_device(op, "valid", valid, "logits", logits)
    return reference.z_loss(logits, coefficient, valid)
