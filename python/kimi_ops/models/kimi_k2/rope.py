# SPDX-License-Identifier: MIT
"""Rotary positions of interleaved pairs, with YaRN's stretched frequencies."""

import math

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.config import KimiK2Config


def inverse_frequencies(config: KimiK2Config, device: torch.device | str = "cpu") -> Tensor:
    """Radians a position for each of the D/2 rotary pairs, [D/2] fp32 (D = qk_rope_head_dim).

    Pair i turns by theta^(-2i/D). YaRN divides the frequency of the slow pairs by `factor`; the
    ramp runs between the pairs that make `beta_fast` and `beta_slow` turns in the original window.
    Kimi K2 sets both to 1, so the ramp is a cut between pairs 19 and 20.
    """
    dim, base, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    plain = 1.0 / base**exponent
    if scaling is None or scaling.factor == 1:
        return plain

    def pair_with_turns(turns: float) -> float:
        window = scaling.original_max_position_embeddings
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    pair = torch.arange(dim // 2, device=device, dtype=torch.float32)
    stretched = ((pair - low) / width).clamp(0, 1)  # 0 keeps the frequency, 1 divides it
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def rotary_tables(config: KimiK2Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [S, D/2] fp32 at `positions` [S]."""
    angles = positions.float()[:, None] * inverse_frequencies(config, positions.device)
    scaling = config.rope_scaling
    if scaling is None:
        return angles.cos(), angles.sin()
    growth = scaling.magnitude(scaling.mscale) / scaling.magnitude(scaling.mscale_all_dim)
    return angles.cos() * growth, angles.sin() * growth


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) of x [..., S, D] by their angle; fp32 inside.

    The pairs stay where they are. Hugging Face moves the first halves before the second ones in q
    and k alike: the products q.k are the same.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
