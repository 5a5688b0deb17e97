# SPDX-License-Identifier: MIT
"""Quantile balancing: the selection bias from quantiles of what each expert lacks."""

import torch
from torch import Tensor

from kimi_ops import _check
from kimi_ops.choices import ScoreFunction
from kimi_ops.moe.topk_gate import topk_gate
from kimi_ops.operators import balance as operators


def quantile_histogram_(
    histogram: Tensor,
    logits: Tensor,
    k: int,
    *,
    bounds: Tensor,
    expert_bias: Tensor | None = None,
    score_function: ScoreFunction = "sigmoid",
    valid: Tensor | None = None,
) -> Tensor:
    r"""Add to each expert's histogram how much its scores lack to be chosen, in place.

    .. math::
        \alpha_t = (k+1)\text{-th largest of } s_{te} + b_e, \quad r_{te} = \alpha_t - s_{te}, \quad
        \text{bin} = \lfloor (r - \text{low}) \cdot \tfrac{\text{bins}}{\text{high} - \text{low}}
        \rfloor

    The bias is added to scores (s + b), as `topk_gate` adds it. Sums are of integers: any order of
    tokens, micro-batches and ranks gives the same histogram, bit for bit, on every engine.

    Parameters
    ----------
    histogram : Tensor [E, bins] int32
        Summed over the micro-batches of a step; all-reduce it over ranks that have other tokens,
        once, and zero it after `quantile_bias`. Leave forwards out that are evaluated or repeated.
    logits : Tensor [T, E], float32, bfloat16 or float16
    k : int
        Experts a token: below E, at most 31.
    bounds : Tensor [2] float32
        low < high: ``[min(b) - 1, max(b) + 1]`` holds every r of a sigmoid. r outside of them
        counts in the end bins. Not to be changed between the first call and `quantile_bias`.
    expert_bias : Tensor [E] float32, optional
    score_function : {"sigmoid", "softmax", "sqrtsoftplus"}
    valid : Tensor [T] bool, optional
        False leaves the token out: padding would shift the quantiles.

    Returns
    -------
    Tensor
        `histogram`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or device; k = E, where nothing is left out; on the CPU bounds that are
        no two numbers low < high. The histogram is untouched.

    References
    ----------
    Kimi K3, arXiv 2607.24653, section 2.3.3.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> s = torch.tensor([[.9, .1, .2, .3], [.8, .2, .1, .4], [.7, .6, .3, .2], [.9, .5, .4, .1]])
    >>> histogram = torch.zeros(4, 1000, dtype=torch.int32)
    >>> bounds = torch.tensor([-1.001, 0.999])
    >>> kimi_ops.quantile_histogram_(histogram, s.logit(), 1, bounds=bounds).sum().item()
    16
    >>> bias = kimi_ops.quantile_bias(histogram, 1, bounds=bounds)
    >>> [round(b, 3) for b in bias.tolist()]
    [-0.474, 0.125, 0.225, 0.125]
    """
    op = "quantile_histogram_"
    _check.tensor(op, "logits", logits)
    _check.shape(op, "logits", logits, ("T", "E"), "flatten batch and sequence first")
    experts = logits.shape[1]
    _check.between(op, "k", k, 1, min(experts - 1, 31), " (below E, so that a score is left out)")
    with torch.no_grad():
        gate = topk_gate(
            logits, k + 1, score_function=score_function, expert_bias=expert_bias,
            renormalize=False,
        )  # fmt: skip
        cutoffs = gate.weights[:, k]
        if expert_bias is not None:
            cutoffs = cutoffs + expert_bias[gate.indices[:, k].long()]
        operators.quantile_histogram_(
            histogram, logits.detach(), cutoffs, bounds, score_function, valid
        )
    return histogram


def quantile_bias(histogram: Tensor, k: int, *, bounds: Tensor) -> Tensor:
    r"""The selection bias with which every expert is chosen equally often: solves the histograms.

    ``b_e`` is the k/E-quantile of expert e's r, minus the mean of all: with n tokens the value at
    rank ``ceil(n k / E)``, in a straight line inside its bin.

    Parameters
    ----------
    histogram : Tensor [E, bins] int32 or int64
        From `quantile_histogram_`.
    k : int
        That of the histograms.
    bounds : Tensor [2] float32
        Those of the histograms.

    Returns
    -------
    Tensor [E] float32
        Of mean 0; all 0 where there are no tokens. Computed in float64 of exact counts: the same
        bits for the same histogram. Right to a bin's width; loads are what to judge it by.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype or shape.

    Examples
    --------
    >>> import torch, kimi_ops
    >>> histogram = torch.tensor([[2, 0], [0, 2]], dtype=torch.int32)
    >>> kimi_ops.quantile_bias(histogram, 1, bounds=torch.tensor([0.0, 2.0])).tolist()
    [-0.5, 0.5]
    """
    op = "quantile_bias"
    _check.tensor(op, "histogram", histogram)
    _check.dtype(op, "histogram", histogram, (torch.int32, torch.int64))
    _check.shape(op, "histogram", histogram, ("E", "bins"))
    experts, bins = histogram.shape
    _check.between(op, "k", k, 1, experts)
    _check.tensor(op, "bounds", bounds)
    _check.shape(op, "bounds", bounds, (2,))
    counts = histogram.long()
    until = counts.cumsum(1)
    rank = (until[:, -1:] * k + experts - 1).div(experts, rounding_mode="floor")
    bin = (until < rank).sum(1, keepdim=True).clamp(max=bins - 1)
    here, upto = counts.gather(1, bin), until.gather(1, bin)
    inside = (rank - (upto - here)).double() / here.clamp(min=1)
    low, high = bounds.double().unbind()
    bias = low + (bin + inside).squeeze(1) * ((high - low) / bins)
    return (bias - bias.mean()).float()
