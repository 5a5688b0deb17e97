# SPDX-License-Identifier: MIT
"""The experiment runs, on a model and a text small enough for a test, and says what it found."""

from pathlib import Path

import pytest

from benchmarks.experiments import qk_clip as experiment


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "figure.svg"
    size = ["--steps", "6", "--sequences", "2", "--window", "32", "--layers", "1"]
    runs = experiment.main([*size, "--tau", "0.02", "--lr", "0.05", "--out", str(out)])
    assert list(runs) == ["AdamW", "Muon", "MuonClip"]
    for run in runs.values():
        assert len(run.losses) == len(run.maxima) == len(run.clipped) == 6
        assert 0 < run.validation < 6
    assert runs["Muon"].losses[0] == runs["MuonClip"].losses[0] == runs["AdamW"].losses[0]
    assert max(runs["MuonClip"].clipped) > 0 == max(runs["Muon"].clipped + runs["AdamW"].clipped)
    assert runs["MuonClip"].maxima[-1] < runs["Muon"].maxima[-1]
    printed = capsys.readouterr().out
    assert "validation loss" in printed and "Muon passes it" in printed
    assert out.read_text().startswith("<?xml") and "MuonClip" in out.read_text()


def test_growth():
    assert experiment.growth([1.0, 10.0, 5.0, 6.0, 12.0, 6.0], tau=10.0) == 2.0
    assert experiment.growth([1.0, 2.0], tau=10.0) == 1.0
