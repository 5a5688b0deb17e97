# SPDX-License-Identifier: MIT
"""Layers made of the ops: a mixture of experts and its parts, as `torch.nn.Module`."""

from kimi_ops.nn.experts import Experts, StoredExperts
from kimi_ops.nn.latent import Latent
from kimi_ops.nn.mlp import MLP
from kimi_ops.nn.moe import MoE
from kimi_ops.nn.router import Router
from kimi_ops.nn.stored import StoredWeight

__all__ = ["MLP", "Experts", "Latent", "MoE", "Router", "StoredExperts", "StoredWeight"]
