# SPDX-License-Identifier: MIT
"""`KimiK2Config`: what a ``config.json`` says, refused where it is not understood."""

from kimi_ops.models.kimi_k2.config.config import KimiK2Config
from kimi_ops.models.kimi_k2.config.rope_scaling import RopeScaling

__all__ = ["KimiK2Config", "RopeScaling"]
