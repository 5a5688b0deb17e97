# SPDX-License-Identifier: MIT
"""Kimi K2: latent attention, a mixture of experts, the layout of the Hugging Face checkpoint.

`model`, `decoder`, `attention` and `moe` are the model; docs/kimi_k2.md says what the rest is.
"""

from kimi_ops.models.kimi_k2.attention import Attention, LatentCache
from kimi_ops.models.kimi_k2.config import KimiK2Config, RopeScaling
from kimi_ops.models.kimi_k2.expert_ranks import ExpertRanks
from kimi_ops.models.kimi_k2.model import KimiK2
from kimi_ops.models.kimi_k2.moe import MoE
from kimi_ops.models.kimi_k2.outputs import KimiK2Output
from kimi_ops.models.kimi_k2.pipeline import Stage, load_stage
from kimi_ops.models.kimi_k2.pretrained import load_layer
from kimi_ops.models.kimi_k2.two_batches import BatchOutput, backward_two, forward_two

__all__ = [
    "Attention",
    "BatchOutput",
    "ExpertRanks",
    "KimiK2",
    "KimiK2Config",
    "KimiK2Output",
    "LatentCache",
    "MoE",
    "RopeScaling",
    "Stage",
    "backward_two",
    "forward_two",
    "load_layer",
    "load_stage",
]
