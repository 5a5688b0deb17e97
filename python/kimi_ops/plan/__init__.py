# SPDX-License-Identifier: MIT
"""Predicts runs on many GPUs: memory, bytes by link, times, the layout to take."""

from kimi_ops.plan.hardware import HARDWARE, Hardware
from kimi_ops.plan.planner import Plan
from kimi_ops.plan.questions import plan

__all__ = ["HARDWARE", "Hardware", "Plan", "plan"]
