# SPDX-License-Identifier: MIT
"""Load balancing of the router: the bias rules and the auxiliary losses."""

import torch
from torch import Tensor

from kimi_ops.operators import balance as operators


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
    with torch.no_grad():
        operators.update_expert_bias_(bias, tokens_per_expert, rate, bool(centered))
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
    loss, _ = operators.sequence_balance_loss(
        logits, indices, num_sequences, score_function, coefficient
    )
    return loss


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
    return operators.z_loss(logits, coefficient, valid)[0]
