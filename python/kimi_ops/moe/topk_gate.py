# SPDX-License-Identifier: MIT
"""Top-k gating: router scores, selection of the experts, weights and expert counts; and the same
with the plan of the experts' rows beside it."""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import ScoreFunction, Selection
from kimi_ops.operators import topk_gate as operators
from kimi_ops.routing import PermutePlan, as_int32

_SELECTIONS = get_args(Selection)


class TopkGate(NamedTuple):
    """What :func:`topk_gate` returns; ``weights, indices = gate[:2]`` where no count is needed."""

    weights: Tensor  #: [T, K] float32
    indices: Tensor  #: [T, K] int32, best first; -1 a slot without an expert
    tokens_per_expert: Tensor  #: [E] int32


def topk_gate(
    logits: Tensor,
    k: int | None = None,
    *,
    score_function: ScoreFunction = "sigmoid",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score_topk: int = 2,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    valid: Tensor | None = None,
    select: Selection = "scores",
    ids: Tensor | None = None,
    mask: Tensor | None = None,
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
    logits : Tensor [..., E], float32, bfloat16 or float16
        Router logits; [T, E], or with any leading shape, which the results then have. Rows may be
        strided. E at most 1024.
    k : int
        Experts a token, at most 32. Not needed beside `ids`.
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
    valid : Tensor [...] bool, optional
        False drops the token: ids -1, weights 0, not counted.
    select : {"scores", "logits"}
        What the bias is added to, groups add up and experts are chosen by. Weights are of scores.
    ids : Tensor [..., k] int32 or int64, optional
        Experts chosen elsewhere (a rollout's record, a hash, a forced balance), in their order:
        bias, groups and `select` have no part. Weights and gradient are those of the dense scores
        at these ids. -1 and E are slots without an expert: id -1, weight 0, not counted.
    mask : Tensor [E] or [..., E] bool, optional
        False: the expert is not there for the token, as if its logit were NaN. A slot that finds no
        expert has id -1 and weight 0. Not beside `ids`.

    Returns
    -------
    TopkGate
        ``weights`` [..., k] float32, ``indices`` [..., k] int32 in descending (biased) score,
        ``tokens_per_expert`` [E] int32.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong type, dtype, shape, device or range; nothing is launched. Of `ids`
        outside -1 .. E the CPU speaks, and with ``KIMI_OPS_CHECK=1`` other devices.
    RuntimeError
        CUDA tensors in a build without CUDA kernels.

    Notes
    -----
    Differentiable in `logits` through the weights; ids are constants. Once differentiable. `mask`
    costs a copy of the logits and a second pass over the chosen.

    References
    ----------
    DeepSeek-V3, arXiv 2412.19437, eq. 12-16; Kimi K2, arXiv 2507.20534. Replay of ids: arXiv
    2510.11370.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    >>> gate = kimi_ops.topk_gate(logits, k=2)
    >>> gate.indices.tolist(), gate.tokens_per_expert.tolist()
    ([[1, 2]], [0, 1, 1, 0])
    >>> round(gate.weights.sum().item(), 6)
    1.0
    >>> again = kimi_ops.topk_gate(logits, ids=gate.indices)
    >>> torch.equal(again.weights, gate.weights)
    True
    >>> kimi_ops.topk_gate(logits, 2, mask=torch.tensor([True, False, True, True])).indices.tolist()
    [[2, 0]]
    """
    if ids is None and mask is None and k is not None and getattr(logits, "ndim", 2) == 2:
        return TopkGate._make(
            operators.topk_gate(
                logits, k, score_function, expert_bias, num_groups, topk_groups, group_score_topk,
                bool(renormalize), scaling_factor, valid, select,
            )
        )  # fmt: skip
    op = "topk_gate"
    _check.tensor(op, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{op}: logits: expected shape [..., E], got []")
    shape = logits.shape[:-1]
    rows = _rows(logits)
    if valid is not None:
        _check.shape(op, "valid", valid, shape)
        valid = valid.reshape(-1)
    if mask is not None:
        if ids is not None:
            raise ValueError(f"{op}: mask: expected none beside ids, got both; they are the choice")
        rows, mask = _masked(op, rows, mask, shape)
    if ids is None:
        if k is None:
            raise TypeError(f"{op}: k: expected an int, got None; pass it, or ids")
        options = (
            k, score_function, expert_bias, num_groups, topk_groups, group_score_topk,
            bool(renormalize), scaling_factor, valid, select,
        )  # fmt: skip
        if mask is None:
            return _shaped(operators.topk_gate(rows, *options), shape)
        found = operators.topk_gate(rows.detach(), *options)[1]
        there = mask.gather(1, found.clamp(min=0).long())
        ids = torch.where(there, found, -1)
    else:
        _check.tensor(op, "ids", ids)
        _check.shape(op, "ids", ids, (*shape, "k" if k is None else k), "a row of experts a token")
        _check.choice(op, "select", select, _SELECTIONS)
        ids = _rows(as_int32(ids))
    return _shaped(
        operators.topk_gate_given(
            rows, ids, score_function, bool(renormalize), scaling_factor, valid
        ),
        shape,
    )


def _masked(op: str, rows: Tensor, mask: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The logits [T, E], NaN where there is no expert, and the mask [T, E]."""
    _check.tensor(op, "mask", mask)
    _check.dtype(op, "mask", mask, (torch.bool,))
    if mask.dim() != 1:
        _check.shape(op, "mask", mask, (*shape, rows.shape[1]), "or [E], one for all tokens")
    else:
        _check.shape(op, "mask", mask, (rows.shape[1],))
    _check.same_device(op, "mask", mask, "logits", rows)
    mask = _rows(mask).expand_as(rows)
    return rows.masked_fill(~mask, torch.nan), mask


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _shaped(outputs: tuple[Tensor, Tensor, Tensor], shape: torch.Size) -> TopkGate:
    weights, indices, counts = outputs
    k = weights.shape[1]
    return TopkGate(weights.view(*shape, k), indices.view(*shape, k), counts)


def gate_plan(
    logits: Tensor,
    k: int,
    *,
    score_function: ScoreFunction = "sigmoid",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score_topk: int = 2,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    valid: Tensor | None = None,
    select: Selection = "scores",
) -> tuple[TopkGate, PermutePlan]:
    """`topk_gate`, and `permute_plan` of its ids, in one call: for `fused_experts(..., plan=plan)`.

    ``gate = topk_gate(logits, k, ...); plan = permute_plan(gate.indices, E)``, with the same bits.
    On CUDA few tokens need one launch: 64 on a Hopper GPU, 16 elsewhere, of up to 896 experts.

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
    k : int
    score_function, expert_bias, num_groups, topk_groups, group_score_topk, renormalize, \
scaling_factor, valid, select
        As `topk_gate` takes them.

    Returns
    -------
    TopkGate
        ``weights`` [T, K] float32, ``indices`` [T, K] int32, ``tokens_per_expert`` [E] int32.
    PermutePlan
        Of these ids with ``align=1``: T * K rows. Its ``tokens_per_expert`` is the gate's.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `topk_gate`; nothing is launched.

    Notes
    -----
    Differentiable in `logits` through the weights. Once differentiable.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    >>> gate, plan = kimi_ops.gate_plan(logits, k=2)
    >>> gate.indices.tolist()
    [[1, 2], [0, 2]]
    >>> plan.row_map.tolist(), plan.offsets.tolist()
    ([[1, 2], [0, 3]], [1, 2, 4])
    """
    *gate, row_map, source, offsets = operators.gate_plan(
        logits, k, score_function, expert_bias, num_groups, topk_groups, group_score_topk,
        bool(renormalize), scaling_factor, valid, select,
    )  # fmt: skip
    return TopkGate._make(gate), PermutePlan(row_map, source, offsets, gate[2])
