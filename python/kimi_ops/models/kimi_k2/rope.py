# SPDX-License-Identifier: MIT
"""Rotary positions, with stretched frequencies."""

import math

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.config import KimiK2Config, RopeScaling


def inverse_frequencies(config: KimiK2Config, device: torch.device | str = "cpu") -> Tensor:
    """Radians a position for each of the D/2 rotary pairs, [D/2] fp32 (D = qk_rope_head_dim).

    Pair i turns by theta^(-2i/D), where `rope_scaling` stretches nothing.
    """
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    plain = 1.0 / config.rope_theta**exponent
    if scaling is None or scaling.factor == 1 or scaling.rope_type == "dynamic":
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, config.rope_theta, scaling)


def _yarn(plain: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """The frequency of slow pairs is divided by `factor`; the ramp runs between the pairs that make
    `beta_fast` and `beta_slow` turns in the original window. Kimi K2 sets both to 1, so the ramp is
    a cut between pairs 19 and 20.
    """
    dim = 2 * len(plain)

    def pair_with_turns(turns: float) -> float:
        window = scaling.original_max_position_embeddings
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) if high != low else 0.001
    pair = torch.arange(dim // 2, device=plain.device, dtype=torch.float32)
    stretched = ((pair - low) / width).clamp(0, 1)  # 0 keeps the frequency, 1 divides it
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Waves longer than window / low_freq_factor are slowed, those shorter than window /
    high_freq_factor kept, a ramp between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None and high is not None
    turns = plain * scaling.original_max_position_embeddings / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept


def rotary_tables(config: KimiK2Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [S, D/2] fp32 at `positions` [S]."""
    angles = positions.float()[:, None] * inverse_frequencies(config, positions.device)
    growth = 1.0 if config.rope_scaling is None else config.rope_scaling.growth
    return angles.cos() * growth, angles.sin() * growth


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = True) -> Tensor:
    """Turn pairs of x [..., S, D] by their angle; fp32 inside.

    Pair i is (x[2i], x[2i+1]), without `interleave` (x[i], x[i + D/2]). They stay where they are:
    Hugging Face moves the first halves before the second ones, in q and k alike: the products q.k
    are the same.
    """
    wide = x.float()
    if interleave:
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = wide.chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    whole = torch.stack(turned, dim=-1).flatten(-2) if interleave else torch.cat(turned, dim=-1)
    return whole.to(x.dtype)
