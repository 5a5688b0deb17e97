# SPDX-License-Identifier: MIT
"""The examples: numbered, short, listed, and run. Those of several processes (torchrun) have tests
of their own in tests/dist."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.dist.world import torchrun

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ELSEWHERE = {"11_fsdp2": "test_fsdp2_example", "12_pipeline": "test_pipeline_example"}
ALONE = [path for path in EXAMPLES if path.stem not in ELSEWHERE]


def test_they_are_numbered_short_and_listed():
    numbers = [re.fullmatch(r"(\d\d)_[a-z0-9_]+", path.stem)[1] for path in EXAMPLES]
    assert numbers == [f"{i:02}" for i in range(1, len(EXAMPLES) + 1)]
    for path in EXAMPLES:
        text = path.read_text()
        assert text.count("\n") < 80, path.name
        assert f"examples/{path.name}" in text, f"{path.name}: how it is run"
    for page in ("docs/examples.md", "README.md"):
        listed = re.findall(r"examples/(\d\d_\w+\.py)", (ROOT / page).read_text())
        assert {path.name for path in EXAMPLES} <= set(listed), page
    for name, test in ELSEWHERE.items():
        assert f"examples/{name}.py" in (ROOT / f"tests/dist/{test}.py").read_text()


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_it_runs(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_ranks_are_processes_too():
    printed = torchrun(2, str(ROOT / "examples/07_expert_parallel.py"))
    assert len(re.findall(r"^rank [01], shm: experts", printed, re.MULTILINE)) == 2
