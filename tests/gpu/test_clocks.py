# SPDX-License-Identifier: MIT
"""Clocks inside of kernels: the device program's own code, built for the host runner, whose clock
counts the marks."""

import json
import sys

import numpy as np
import pytest
from test_primitives import build_host

from benchmarks.checkout import ROOT
from benchmarks.device_check import clocks

SCALE = 256


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clocks")
    build_host(ROOT / "benchmarks" / "device_check" / "clocks.cu", folder)
    return folder / "clocks_host.so"


def test_a_run_without_a_gpu(library, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "clocks.json"
    arguments = ["clocks", "--library", library, "--scale", SCALE, "--json", path]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    assert clocks.main() == 0
    found = json.loads(path.read_text())
    for name, parts in clocks.PHASES.items():
        assert list(found[name]) == [phase for phase, _ in parts]
        assert all(row["cycles"] > 0 for row in found[name].values())
    assert found[clocks.FP8]["cycles a block of depth"] > 0
    assert found["one row"]["words elsewhere"] == 0 and "refused" not in found["one row"]
    assert "128" in found["one row, swizzled"]["refused"]  # the model asks for 1024
    assert "rows, sorting" in capsys.readouterr().out


def test_phases_and_periods_are_of_warps_that_came() -> None:
    found = np.zeros((clocks.BLOCKS, clocks.WARPS, clocks.POINTS), np.int64)
    with pytest.raises(RuntimeError, match="no warp came"):
        clocks.phases(found, 2)
    found[0, 3, :3] = 10, 15, 40
    found[1, 3, :2] = 1, 1000
    assert clocks.phases(found, 2) == [5, 25]
    found[:] = 0
    found[0, 4, :4] = 1000 + 8 * 800 * np.arange(4)
    found[0, 8, :4] = found[0, 4, :4] + 200
    assert clocks.loop(found) == {"cycles a block of depth": 800.0, "apart, periods": 0.25}
