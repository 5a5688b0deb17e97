# SPDX-License-Identifier: MIT
"""What is told of one run and of several."""

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from kimi_ops.agentic import demo as command
from kimi_ops.agentic import results
from kimi_ops.agentic.evaluate import SPLITS, Score
from kimi_ops.agentic.results import CRITICS, WAYS, Results, table
from kimi_ops.agentic.stages import Place
from kimi_ops.agentic.tasks import FAMILIES, PLAIN, SYSTEM
from kimi_ops.cli.agentic import agentic
from kimi_ops.models.kimi_k2.chat import Enforcer
from tests.agentic.agentic_parts import tiny


def run_of(success, *, pairs=4, accuracy=0.5, calls=10, malformed=1):
    """Of one stage, the same everywhere."""
    score = Score(
        dict.fromkeys(FAMILIES, success),
        dict.fromkeys(FAMILIES, success / 2),
        dict.fromkeys(FAMILIES, 1.0),
        calls,
        malformed,
        in_budget=1.0,
    )
    ways = {way: dict.fromkeys(SPLITS, dataclasses.asdict(score)) for way in WAYS}
    judged = {"accuracy": accuracy, "bias": 0.25, "pairs": pairs}
    return {"sft": {**ways, "critic": dict.fromkeys(CRITICS, judged), "text_loss": 2.0}}


def test_one_run_is_told_in_a_line_for_each_way_and_split():
    told = table([run_of(0.25)]).splitlines()
    assert len(told) == 1 + len(WAYS) * len(SPLITS) + 1
    assert told[0].split()[-7:-3] == ["verifiable", "pass^k", "pass@k", "malformed"]
    assert told[1].split() == [
        "sft", "greedy", "trained", *["25.0"] * (len(FAMILIES) + 1), "12.5", "100.0",
        "10.0", "0.0", "100.0",
    ]  # fmt: skip
    assert told[-1].endswith(
        "verifiable 50.0 % of 4 (bias +0.25), tell 50.0 % of 4 (bias +0.25), "
        "scripted tell 50.0 % of 4 (bias +0.25); text 2.000 nats a byte"
    )


def test_tell_is_no_part_of_what_can_be_verified():
    found = run_of(0.5)
    for split in SPLITS:
        found["sft"]["greedy"][split] = {
            **found["sft"]["greedy"][split],
            "success": {family: float(family == "tell") for family in FAMILIES},
        }
    cells = table([found]).splitlines()[1].split()
    assert cells[3 + len(FAMILIES)] == "0.0"


def test_of_several_runs_the_mean_and_the_range_are_told():
    runs = [run_of(0.25), run_of(0.75, pairs=12, accuracy=1.0, malformed=3)]
    told = table(runs).splitlines()
    assert len(told) == 1 + 2 * len(WAYS) * len(SPLITS) + 1
    shares = ["50.0"] * (len(FAMILIES) + 1)
    assert told[1].split()[3:] == [*shares, "25.0", "100.0", "20.0", "0.0", "100.0"]
    ranges = ["25-75"] * (len(FAMILIES) + 1)
    assert told[2].split() == [*ranges, "12-38", "100-100", "10-30", "0-0", "100-100"]
    assert "verifiable 87.5 % of 16" in told[-1]  # every pair counts once


def test_each_way_is_played_as_it_is_called(tmp_path, monkeypatch):
    played = []

    def roll_out(model, tokenizer, tasks, *, temperature, enforcer):
        played.append((len(tasks), temperature, enforcer, *set(tasks)))
        return tasks

    monkeypatch.setattr(results, "held_out_tasks", lambda split, count, system: [system] * count)
    monkeypatch.setattr(results, "roll_out", roll_out)
    monkeypatch.setattr(results, "score", lambda rolls, tries: Score(calls=tries))
    monkeypatch.setattr(results, "_shown", lambda rolls: "said")
    monkeypatch.setattr(results, "_critics", lambda *_: {})
    monkeypatch.setattr(results, "text_loss", lambda model: 2.0)
    place, found = Place(tmp_path, str, False), Results(tmp_path)
    found.add(place, "sft", 1.0, tiny(), 5, 3)
    ways = [(5, 0.0, None, SYSTEM), (5, 0.0, Enforcer, SYSTEM)]
    ways += [(15, 1.0, None, SYSTEM), (15, 1.0, None, PLAIN)]
    assert played == [way for way in ways for _ in SPLITS]
    assert found.found["sft"]["sampled"]["words"]["calls"] == 3
    Results(tmp_path).add(place, "sft", 1.0, tiny(), 5, 3)
    assert len(played) == 12
    del found.found["sft"]["enforced"]  # as a run before that way was there
    found.add(place, "sft", 1.0, tiny(), 5, 3)
    assert len(played) == 24


@pytest.fixture
def told(monkeypatch):
    app, runs = typer.Typer(), []
    app.command()(agentic)

    def demo(out, settings, **options):
        runs.append((out.name, settings.seed, settings.sft.seed, settings.rl.seed))
        return run_of(settings.seed / 10)

    monkeypatch.setattr(command, "demo", demo)
    return lambda *options: (CliRunner().invoke(app, options, catch_exceptions=False), runs)


def test_several_seeds_run_in_folders_of_their_own(told, tmp_path):
    result, runs = told("--out", str(tmp_path / "run"), "--seed", "3", "--seeds", "2")
    assert runs == [("seed-3", 3, 3, 3), ("seed-4", 4, 4, 4)]
    lines = result.output.splitlines()
    assert lines[0] == "of 2 seeds" and lines[2].split()[3] == "35.0"
    assert lines[3].split()[0] == "30-40"


def test_one_seed_runs_where_it_is_told(told, tmp_path):
    result, runs = told("--out", str(tmp_path / "run"), "--seed", "3")
    assert runs == [("run", 3, 3, 3)] and not result.output


def test_seeds_of_synthesis_alone_have_no_table(told, tmp_path):
    result, runs = told("--out", str(tmp_path), "--seeds", "2", "--stage", "synthesis")
    assert len(runs) == 2 and not result.output
