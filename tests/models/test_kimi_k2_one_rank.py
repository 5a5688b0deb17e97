# SPDX-License-Identifier: MIT
"""benchmarks/experiments/one_rank_of_k2.py: a real layer as one of 384 ranks has it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.experiments.one_rank_of_k2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_forward_and_backward_of_a_share_of_the_trillion():
    done = run("--expert-parallel", "384", "--tokens", "4")
    assert done.returncode == 0, done.stderr
    # of 61 equal parts of attention, a shared and a routed expert, a router, norms
    weights = 6_168_569_856 // 61 + 2 * 44_040_192 + 2_752_512 + 2 * 7168
    assert done.stdout.startswith(f"1 of 384 experts, {weights / 1e9:.3f} G parameters\n")
    for name in ("forward", "backward"):
        assert re.search(rf"^{name} .* s .* TFLOP/s, +\d+% of .* tokens/s$", done.stdout, re.M)
    peak = float(re.search(r"peak memory ([\d.]+) GB", done.stdout)[1])
    assert 4 * weights < 1e9 * peak < 4 * weights + 1.5e9


def test_ranks_that_do_not_divide_the_experts_are_refused():
    done = run("--expert-parallel", "7")
    assert done.returncode == 1 and "expected a divisor of 384 experts, got 7" in done.stderr
