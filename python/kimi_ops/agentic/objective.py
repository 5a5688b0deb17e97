# SPDX-License-Identifier: MIT
"""What reinforcement minimises: pure functions of tensors.

Of K answers y to a prompt, with rewards r, their mean m and the policy pi_old that wrote them, Kimi
K2 (arXiv 2507.20534, 3.2) asks that tau log(pi / pi_old) be r - m:

    L = mean over y of (r - m - tau s)^2 / (2 tau |y|)
    s = sum over y's own ids of log pi - log pi_old

Divided by 2 tau its gradient is that of Kimi K1.5 (arXiv 2501.12599, eq. 3), whatever tau is, so
that the weights of other losses beside it mean something; divided by the length |y|, long answers
weigh no more than short ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["advantages", "chosen_log_probs", "log_ratios", "squared_losses"]


def advantages(rewards: Tensor) -> Tensor:
    """Rewards [groups, K] over the mean of their group.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.agentic.objective import advantages
    >>> advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist()
    [[0.5, -0.5], [0.0, 0.0]]
    """
    return rewards - rewards.mean(-1, keepdim=True)


def log_ratios(new: Tensor, old: Tensor, own: Tensor) -> Tensor:
    """s [N] of log probabilities [N, S]: the sum of new - old over a row's own ids.

    Parameters
    ----------
    new, old : Tensor [N, S]
        Only `new` has a gradient.
    own : Tensor [N, S] bool
        What the model wrote.
    """
    return (new - old.detach()).masked_fill(~own, 0.0).sum(-1)


def squared_losses(ratios: Tensor, advantage: Tensor, lengths: Tensor, tau: float) -> Tensor:
    """Of each answer its part of L, [N]; L is their mean.

    Parameters
    ----------
    ratios, advantage : Tensor [N]
        s and r - m of each answer.
    lengths : Tensor [N]
        Ids that the model wrote; none count as one.
    tau : float
        How dear it is to leave the policy that wrote the answers; above 0.

    Raises
    ------
    ValueError
        `tau` is not above 0.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.agentic.objective import squared_losses
    >>> s = torch.zeros(2, requires_grad=True)
    >>> squared_losses(s, torch.tensor([0.5, -0.5]), torch.ones(2), tau=0.1).mean().backward()
    >>> s.grad.tolist()
    [-0.25, 0.25]
    """
    if not tau > 0:
        raise ValueError(f"squared_losses: tau: expected a number above 0, got {tau}; try 0.05")
    return (advantage - tau * ratios).square() / (2 * tau * lengths.clamp(min=1))


def chosen_log_probs(logits: Tensor, ids: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities [N, S] of the ids behind the first under softmax(logits / temperature), and
    the entropies [N, S] of what they were drawn from, without a gradient.

    Parameters
    ----------
    logits : Tensor [N, S, V]
    ids : Tensor [N, S + 1] int64
    temperatures : Tensor [N]
        At which the rows were drawn; above 0.
    """
    logs = (logits.float() / temperatures[:, None, None]).log_softmax(-1)
    with torch.no_grad():
        entropies = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, ids[:, 1:, None])[..., 0], entropies
