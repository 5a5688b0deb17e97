# SPDX-License-Identifier: MIT
"""Choices of experts with a known skew."""

import torch
from torch import Tensor


def zipf_loads(
    alpha: float, seed: int, experts: int = 384, k: int = 8, tokens: int = 32768
) -> Tensor:
    """[E] tokens of each expert where the n-th is chosen with probability as 1 / n ** alpha.

    K distinct ones for each token (Gumbel's trick); in random places.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator).log_()
    scores *= torch.arange(1, experts + 1) ** alpha  # those nearest to 0 are chosen
    counts = torch.bincount(scores.topk(k, dim=1).indices.flatten(), minlength=experts)
    return counts[torch.randperm(experts, generator=torch.Generator().manual_seed(17))].double()
