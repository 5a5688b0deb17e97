# SPDX-License-Identifier: MIT
"""examples/fsdp2_muonclip.py: any number of processes prints the losses of one, and goes on from
the checkpoint of another number."""

import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.dist.world import fork

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/fsdp2_muonclip.py"


def told(text: str) -> dict[int, float]:
    lines = re.findall(r"^step (\d+) loss ([\d.]+) smallest gamma ([\d.]+)$", text, re.MULTILINE)
    assert any(float(gamma) < 0.99 for _, _, gamma in lines)  # QK-Clip clips
    return {int(step): float(loss) for step, loss, _ in lines}


def torchrun(processes: int, *arguments: str) -> dict[int, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    run = subprocess.run(
        [*command, str(processes), str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert run.returncode == 0, run.stderr
    return told(run.stdout)


def script(rank: int, folder: Path, *arguments: str) -> None:
    """As one process of torchrun."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    sys.argv = [str(EXAMPLE), *arguments]
    with (folder / "printed").open("w") as file, redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


def alone(folder: Path, *arguments: str) -> dict[int, float]:
    fork(script, 1, folder, *arguments)
    return told((folder / "printed").read_text())


@pytest.mark.slow
def test_two_processes_learn_as_one_does(tmp_path: Path):
    saved = ("--checkpoint", str(tmp_path / "saved"))
    single = alone(tmp_path, "--steps", "5")
    shared = torchrun(2, "--steps", "3", *saved)
    later = alone(tmp_path, "--steps", "5", *saved)
    assert list(shared) == [0, 1, 2] and list(later) == [3, 4]
    assert single == pytest.approx(shared | later, abs=2e-4)
    assert single[4] < 0.85 * single[0]
