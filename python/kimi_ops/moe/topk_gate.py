# SPDX-License-Identifier: MIT
"""Top-k gating: router scores, selection of the experts, weights and expert counts; and the same
with the plan of the experts' rows beside it."""

from typing import NamedTuple

from torch import Tensor

from kimi_ops.operators import topk_gate as operators
from kimi_ops.routing import PermutePlan


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
    outputs = operators.topk_gate(
        logits, k, score_function, expert_bias, num_groups, topk_groups, group_score_topk,
        bool(renormalize), scaling_factor, valid,
    )  # fmt: skip
    return TopkGate._make(outputs)


def gate_plan(
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
) -> tuple[TopkGate, PermutePlan]:
    """`topk_gate`, and `permute_plan` of its ids, in one call: for `fused_experts(..., plan=plan)`.

    ``gate = topk_gate(logits, k, ...); plan = permute_plan(gate.indices, E)``, with the same bits.
    On CUDA few tokens need one launch: 64 on a Hopper GPU, 16 elsewhere, of up to 896 experts.

    Parameters
    ----------
    logits : Tensor [T, E], float32, bfloat16 or float16
    k : int
    score_function, expert_bias, num_groups, topk_groups, group_score_topk, renormalize, \
scaling_factor, valid
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
        bool(renormalize), scaling_factor, valid,
    )  # fmt: skip
    return TopkGate._make(gate), PermutePlan(row_map, source, offsets, gate[2])
