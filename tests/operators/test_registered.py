# SPDX-License-Identifier: MIT
"""Whatever part of the package a program loads first, it loads, and torch has all operators."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_ops
import kimi_ops.formats

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "first", ["kimi_ops.compat.vllm", "kimi_ops.nn", "kimi_ops.parallel.shm", "kimi_ops.operators"]
)
def test_any_part_may_be_the_first(first):
    code = (
        f"import {first}, torch, kimi_ops; "
        "print(torch.ops.kimi_ops.z_loss, torch.ops.kimi_ops.count_once_, kimi_ops.nn.MoE.__name__)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.stdout.split() == ["kimi_ops.z_loss", "kimi_ops.count_once_", "MoE"], (
        result.stderr
    )


def test_a_module_is_loaded_alone(monkeypatch):
    """`from kimi_ops import formats` in a module that the public names need must not ask for them:
    they are half loaded."""
    monkeypatch.setattr(
        "kimi_ops._lazy.public_names", lambda: pytest.fail("asked for public names")
    )
    assert kimi_ops.__getattr__("formats") is kimi_ops.formats
