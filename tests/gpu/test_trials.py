# SPDX-License-Identifier: MIT
"""The variants that a GPU is to decide on: names that the library knows, and a run without one."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.checkout import ROOT
from benchmarks.device_check import parts, trials
from benchmarks.device_check.trials import Case

SWITCHES = re.findall(r"^  int32_t (\w+) = ", (ROOT / "csrc/gemm/sm90/job.h").read_text(), re.M)


@pytest.fixture(autouse=True)
def variable(monkeypatch):
    monkeypatch.setenv(trials.VARIABLE, "")


def test_every_switch_is_tried_and_no_other() -> None:
    variants = [v for case in trials.cases("cpu", 64) for v in case.variants if v]
    named = {part.split("=")[0] for v in variants for part in v.split(",")}
    assert named == set(SWITCHES)


def test_all_fit_their_four_minutes(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["trials", "--list"])
    trials.main()
    *_, last = capsys.readouterr().out.splitlines()
    name, seconds, _ = last.split()
    clocks, step = parts.trials(Path())
    assert name == "all" and 30 < float(seconds) < 0.8 * step.limit_s
    assert clocks.limit_s + step.limit_s <= 240


def test_bits_may_be_other_without_an_epilogue_alone() -> None:
    results = iter([torch.zeros(2), torch.ones(2), torch.ones(2)])
    case = Case("a case", [trials.NONE, "lead=1"], lambda: lambda: next(results), {})
    with pytest.raises(RuntimeError, match="a case: lead=1: other bits"):
        case.run("cpu")


def test_a_run_without_a_gpu(tmp_path: Path, monkeypatch, capsys) -> None:
    every = trials.cases
    few = lambda device, scale: itertools.islice(every(device, scale), 8, 9)  # noqa: E731
    monkeypatch.setattr(trials, "cases", few)
    path = tmp_path / "trials.json"
    monkeypatch.setattr(sys, "argv", ["trials", "--device", "cpu", "--json", str(path)])
    trials.main()
    found = json.loads(path.read_text())
    names = [row["variant"] for row in found]
    assert names == ["as shipped", "prefetch=0", "boxes=0", "add_"]
    assert all(row["us"] > 0 for row in found) and "prefetch=0" in capsys.readouterr().out


def test_other_bits_end_the_run() -> None:
    results = iter([torch.zeros(2), torch.tensor([0.0, 1.0])])
    case = Case("a case", ["lead=1"], lambda: lambda: next(results), {})
    with pytest.raises(RuntimeError, match="a case: lead=1: other bits than as shipped"):
        case.run("cpu")
