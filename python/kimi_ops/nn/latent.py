# SPDX-License-Identifier: MIT
"""Routed experts of a width of their own: down to it, through them, a norm of the sum, and up."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Latent"]


class Latent(nn.Module):
    r"""The way of tokens to experts that are narrower than the model, and back.

    .. math:: y = W_\text{up}\, \text{RMSNorm}\Bigl(\sum_k w_k\, \text{expert}_k(W_\text{down} x)
        \Bigr)

    The norm is of the whole weighted sum, so it comes behind a sum over ranks, too.

    Parameters
    ----------
    hidden_size, latent_size : int
        H and Z, the hidden size of the experts.
    norm : bool
        False leaves the norm out, as in Nemotron-H.
    eps : float
        Of the norm.
    **factory
        ``device`` and ``dtype`` of the parameters.

    Attributes
    ----------
    down_proj : Linear, Z from H
    norm : RMSNorm [Z] or None
    up_proj : Linear, H from Z

    Notes
    -----
    Kimi K3 (arXiv 2607.24653) has H 7168 and Z 3584; its checkpoints name these layers
    ``routed_expert_down_proj``, ``routed_expert_norm`` and ``routed_expert_up_proj``.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.nn import Experts, Latent, MLP, MoE, Router
    >>> experts = Experts(8, 32, 48, activation="situ")
    >>> moe = MoE(Router(64, 8, 2), experts, MLP(64, 96, activation="situ"), latent=Latent(64, 32))
    >>> moe(torch.randn(5, 64)).shape
    torch.Size([5, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        *,
        norm: bool = True,
        eps: float = 1e-5,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, latent_size, bias=False, **factory)
        self.norm = nn.RMSNorm(latent_size, eps=eps, **factory) if norm else None
        self.up_proj = nn.Linear(latent_size, hidden_size, bias=False, **factory)

    def forward(self, x: Tensor, routed: Callable[[Tensor], Tensor]) -> Tensor:
        """[T, H] from x [T, H]; `routed` gives complete weighted sums [T, Z] of tokens [T, Z]."""
        y = routed(self.down_proj(x))
        return self.up_proj(y if self.norm is None else self.norm(y))
