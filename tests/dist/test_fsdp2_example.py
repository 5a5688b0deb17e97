# SPDX-License-Identifier: MIT
"""examples/11_fsdp2.py: any number of processes prints the losses of one, and goes on from
the checkpoint of another number."""

import re
from pathlib import Path

import pytest

from tests.dist.world import alone, torchrun

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples/11_fsdp2.py")


def told(text: str) -> dict[int, float]:
    lines = re.findall(r"^step (\d+) loss ([\d.]+) smallest gamma ([\d.]+)$", text, re.MULTILINE)
    assert any(float(gamma) < 0.99 for _, _, gamma in lines)  # QK-Clip clips
    return {int(step): float(loss) for step, loss, _ in lines}


@pytest.mark.slow
def test_two_processes_learn_as_one_does(tmp_path: Path):
    saved = ("--checkpoint", str(tmp_path / "saved"))
    single = told(alone(tmp_path, EXAMPLE, "--steps", "5"))
    shared = told(torchrun(2, EXAMPLE, "--steps", "3", *saved))
    later = told(alone(tmp_path, EXAMPLE, "--steps", "5", *saved))
    assert list(shared) == [0, 1, 2] and list(later) == [3, 4]
    assert single == pytest.approx(shared | later, abs=2e-4)
    assert single[4] < 0.85 * single[0]
