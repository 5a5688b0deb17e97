# SPDX-License-Identifier: MIT
"""The GPU machine's one command: time limits, order, and its answer where there is no GPU."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import device_check
from benchmarks.device_check import Step, check, gpu_missing, main, plan, write_json


def python(name: str, code: str, limit: float = 20.0, **more: object) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, **more)  # type: ignore[arg-type]


@pytest.mark.skipif(gpu_missing() is None, reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert "nothing was run or written" in capsys.readouterr().err


def test_limits_add_up_to_less_than_nine_minutes(tmp_path: Path) -> None:
    assert sum(step.limit_s for step in plan(tmp_path)) <= device_check.TOTAL_SECONDS < 540


def test_a_hanging_step_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    start = time.monotonic()
    good = python("good", "print('fine')")
    hanging = Step("hanging", [sys.executable, "-c", "import time; time.sleep(60)"], 1.5)
    nested = python("nested", child.replace("input()", "import time; time.sleep(60)"), 1.5)
    results = check([good, hanging, nested], tmp_path)
    assert time.monotonic() - start < 20
    assert [r.status for r in results] == ["passed", "timed out", "timed out"]
    assert results[0].tail == "fine\n"


def test_the_whole_is_limited_and_failures_are_told(tmp_path: Path) -> None:
    steps = [
        python("one", "pass"),
        python("bad", "raise SystemExit('broken')"),
        python("absent", "pass", needs="no-such-program"),
        python("slow", "import time; time.sleep(60)"),
        python("late", "pass"),
    ]
    results = check(steps, tmp_path, total_seconds=4.0)
    statuses = [r.status for r in results]
    assert statuses == ["passed", "failed", "skipped", "timed out", "skipped"]
    assert "broken" in results[1].tail and "no-such-program" in results[2].tail
    write_json(results, tmp_path)
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert [step["name"] for step in report["steps"]] == ["one", "bad", "absent", "slow", "late"]
    assert "broken" in (tmp_path / "device_check.log").read_text()


def test_after_a_failed_build_nothing_else_runs(tmp_path: Path) -> None:
    results = check([python("build", "raise SystemExit(1)"), python("next", "pass")], tmp_path)
    assert [r.status for r in results] == ["failed", "skipped"]
    assert results[1].tail == "build failed"
