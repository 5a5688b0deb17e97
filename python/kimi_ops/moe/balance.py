# SPDX-License-Identifier: MIT
"""Load balancing of the router: the bias rules and the auxiliary losses."""

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import ScoreFunction
from kimi_ops.operators import balance as operators
from kimi_ops.routing import as_int32


class SequenceCounts(NamedTuple):
    """What :func:`sequence_counts` returns."""

    tokens_per_expert: Tensor  #: [N, E] int32
    sequence_tokens: Tensor  #: [N] int32


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


def sequence_counts(
    indices: Tensor,
    num_experts: int,
    *,
    num_sequences: int = 1,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
) -> SequenceCounts:
    """How often each sequence chose each expert, and how many tokens it has.

    What `sequence_balance_loss` counts by itself; for counts that are summed over ranks first.

    Parameters
    ----------
    indices : Tensor [T, K] int32 or int64
        Chosen experts; any id outside of 0..E-1 counts for none.
    num_experts : int
        E, at most 1024.
    num_sequences, offsets, valid
        As in `sequence_balance_loss`.

    Returns
    -------
    SequenceCounts
        ``tokens_per_expert`` [N, E] int32 and ``sequence_tokens`` [N] int32.

    Raises
    ------
    TypeError, ValueError
        As `sequence_balance_loss`.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> ids = torch.tensor([[0, 1], [0, 2], [1, -1]])
    >>> counts = kimi_ops.sequence_counts(ids, 3, offsets=torch.tensor([2, 3]))
    >>> counts.tokens_per_expert.tolist(), counts.sequence_tokens.tolist()
    ([[2, 1, 1], [0, 1, 0]], [2, 1])
    """
    offsets = None if offsets is None else as_int32(offsets)
    sequences = _sequences("sequence_counts", num_sequences, offsets)
    return SequenceCounts._make(
        operators.sequence_counts(as_int32(indices), num_experts, sequences, offsets, valid)
    )


def sequence_balance_loss(
    logits: Tensor,
    indices: Tensor,
    *,
    num_sequences: int = 1,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_tokens: Tensor | None = None,
    score_function: ScoreFunction = "sigmoid",
    coefficient: float = 1e-4,
) -> Tensor:
    r"""Sequence-wise auxiliary loss, averaged over the sequences.

    .. math::
        L = \frac{\alpha}{N} \sum_n \sum_e f_{ne} P_{ne}, \quad
        f_{ne} = \frac{E}{K S_n} \sum_{t \in n} \mathbb 1[e \in I_t], \quad
        P_{ne} = \frac{1}{S_n} \sum_{t \in n} \frac{s_{te}}{\sum_i s_{ti}}

    f counts the ids that were chosen (with the bias, if there is one) and gets no gradient.

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
        Router logits, the tokens of a sequence side by side; rows may be strided; E at most 1024.
        NaN counts as -inf and scores 0.
    indices : Tensor [T, K] int32 or int64
        Chosen experts; -1, like any id outside of 0..E-1, counts for none.
    num_sequences : int
        N sequences of T / N tokens each.
    offsets : Tensor [N] int32 or int64, optional
        Sequences of any lengths instead: one past the last token of each, ascending. Tokens behind
        the last one belong to none.
    valid : Tensor [T] bool, optional
        False leaves the token out of f, P and S: padding.
    tokens_per_expert : Tensor [N, E] int32 or int64, optional
    sequence_tokens : Tensor [N] int32 or int64, optional
        Both or neither: f's counts and S from outside, of sequences that several ranks have a part
        of; from `sequence_counts`, summed over them. The sum of the ranks' losses is the loss.
    score_function : {"sigmoid", "softmax", "sqrtsoftplus"}
    coefficient : float
        The weight alpha, 0.0001 in DeepSeek-V3.

    Returns
    -------
    Tensor
        Scalar float32, once differentiable in `logits`. The same bits on every engine. A sequence
        without tokens adds 0 and counts in N.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device, T not a multiple of `num_sequences`, or on the CPU offsets
        that descend or pass T.

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
    >>> valid = torch.arange(8) < 5
    >>> gate = kimi_ops.topk_gate(logits, k=4, valid=valid)
    >>> loss = kimi_ops.sequence_balance_loss(logits, gate.indices, valid=valid, coefficient=1.0)
    >>> round(loss.item(), 6)
    1.0
    """
    op = "sequence_balance_loss"
    _check.tensor(op, "logits", logits)
    _check.tensor(op, "indices", indices)
    _check.shape(op, "logits", logits, ("T", "E"), "flatten batch and sequence first")
    _check.shape(op, "indices", indices, (len(logits), "K"))
    _check.between(op, "logits.shape[1]", logits.shape[1], 1, 1024)
    _check.between(op, "indices.shape[1]", indices.shape[1], 1, 2**31 - 1)
    _check.same_device(op, "indices", indices, "logits", logits)
    offsets = None if offsets is None else as_int32(offsets)
    sequences = _sequences(op, num_sequences, offsets)
    if (tokens_per_expert is None) != (sequence_tokens is None):
        raise ValueError(
            f"{op}: sequence_tokens: expected beside tokens_per_expert, got one of the two; both "
            "are what sequence_counts gives"
        )
    if tokens_per_expert is None or sequence_tokens is None:
        counts, tokens = operators.sequence_counts(
            as_int32(indices), logits.shape[1], sequences, offsets, valid
        )
    else:
        counts, tokens = as_int32(tokens_per_expert), as_int32(sequence_tokens)
        _check.tensor(op, "tokens_per_expert", counts)
        _check.shape(op, "tokens_per_expert", counts, (sequences, logits.shape[1]))
    return operators.sequence_balance_loss(
        logits, counts, tokens, offsets, valid, indices.shape[1], score_function, coefficient
    )


def _sequences(op: str, num_sequences: int, offsets: Tensor | None) -> int:
    """How many there are."""
    if offsets is None:
        return num_sequences
    _check.tensor(op, "offsets", offsets)
    _check.shape(op, "offsets", offsets, ("N",))
    if num_sequences not in (1, len(offsets)):
        raise ValueError(
            f"{op}: num_sequences: expected {len(offsets)} as offsets are, got {num_sequences}; "
            "leave it out"
        )
    return len(offsets)


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
