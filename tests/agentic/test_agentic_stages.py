# SPDX-License-Identifier: MIT
"""What a run leaves in its folder, wherever it dies."""

import dataclasses
import json

import pytest
import torch

from kimi_ops.agentic import demo as command
from kimi_ops.agentic import results, rl, stages
from kimi_ops.agentic.demo import DemoSettings, demo
from kimi_ops.agentic.results import Results
from kimi_ops.agentic.rl import Rl, RlSettings
from kimi_ops.agentic.stages import Place, reinforced
from kimi_ops.agentic.synthesis import training_tools
from kimi_ops.models.kimi_k2.chat import ByteTokenizer
from kimi_ops.train import checkpoint
from tests.agentic.agentic_parts import EXAMPLE, Shortest, as_played, tiny

SETTINGS = RlSettings(steps=4, groups=2, told=1, tries=2, replayed=16, pairs=2)


@pytest.fixture
def reinforce(monkeypatch):
    """The stage in a folder; its metrics' lines."""
    tools = training_tools(200)
    monkeypatch.setattr(rl, "roll_out", as_played)
    monkeypatch.setattr(stages, "training_tools", lambda: tools)
    monkeypatch.setattr(stages, "text", lambda: lambda rng: EXAMPLE)

    def run(out):
        out.mkdir(exist_ok=True)
        place, critic = Place(out, str, False), Shortest()
        reinforced(place, tiny(), ByteTokenizer(), critic, [EXAMPLE], SETTINGS)
        return lines(out)

    return run


def lines(out):
    if not (out / "rl.jsonl").exists():
        return []
    return [json.loads(line) for line in (out / "rl.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dies", ["in a step", "before a line", "before its state is kept"])
def test_a_run_that_dies_loses_no_line_and_has_none_twice(tmp_path, monkeypatch, reinforce, dies):
    whole = reinforce(tmp_path / "whole")
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    out, kept = tmp_path / "broken", checkpoint.replace_file

    def breaks(path, content):
        name = "rl.jsonl" if dies == "before a line" else "rl.pt"
        if path.name == name and len(lines(out)) == (2 if name == "rl.jsonl" else 3):
            raise KeyboardInterrupt
        kept(path, content)

    with monkeypatch.context() as patch:
        if dies == "in a step":
            step = Rl.step

            def stops(self):
                if self.made == 2:
                    raise KeyboardInterrupt
                return step(self)

            patch.setattr(Rl, "step", stops)
        else:
            patch.setattr(stages, "replace_file", breaks)
        with pytest.raises(KeyboardInterrupt):
            reinforce(out)
    assert lines(out) == whole[: 3 if dies == "before its state is kept" else 2]
    assert torch.load(out / "rl.pt", weights_only=True)["history"] == whole[:2]
    assert reinforce(out) == whole
    (out / "rl.jsonl").unlink()
    assert reinforce(out) == whole  # nothing is left to do, and nothing is missing


def test_files_are_replaced_as_a_whole(tmp_path, monkeypatch, reinforce):
    """A process that dies while it writes leaves what stood there."""
    whole = reinforce(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def dies(path, content):
        path.write_bytes(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        reinforce(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "demo", DemoSettings(), say=str, bar=False)
    assert list((tmp_path / "demo").iterdir()) == [] and lines(tmp_path) == whole


def test_results_are_replaced_as_a_whole(tmp_path, monkeypatch):
    """And what was measured before is not measured again."""
    monkeypatch.setattr(results, "roll_out", as_played)
    monkeypatch.setattr(results, "text_loss", lambda model: 5.5)

    def add(stage):
        found = Results(tmp_path)
        found.add(Place(tmp_path, str, False), stage, 1.23, tiny(), 1, 1)
        return found.found

    first = add("sft")
    assert list(first) == ["sft"] and first["sft"]["seconds"] == 1.2
    before, write = (tmp_path / "results.json").read_bytes(), checkpoint._write

    def dies(path, content):
        path.write_bytes(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        add("rl")
    assert (tmp_path / "results.json").read_bytes() == before
    monkeypatch.setattr(checkpoint, "_write", write)
    both = add("rl")
    assert list(both) == ["sft", "rl"] and both["sft"] == first["sft"]
    assert json.loads((tmp_path / "results.json").read_text()) == both


@pytest.mark.parametrize("arms", [(), ("refined", "best"), "refined"])
def test_an_arm_that_there_is_not_is_refused_before_anything_is_done(tmp_path, arms):
    with pytest.raises(ValueError) as refused:
        demo(tmp_path / "run", DemoSettings(), say=str, bar=False, arms=arms)
    assert str(refused.value) == (
        "agentic: arms: expected one or more of refined | frozen | shuffled | oracle, got "
        f"{list(arms)}; name the judges to reinforce under"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["attempts", "episodes", "tries"])
def test_a_run_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"DemoSettings: {name}: expected an int of at least 1, g"):
        DemoSettings(**{name: 0})


def test_a_setting_that_is_no_more_is_named(tmp_path):
    """A folder of an older version."""
    found = json.loads(json.dumps(dataclasses.asdict(DemoSettings())))
    (tmp_path / "settings.json").write_text(json.dumps(found | {"gone": 1}))
    with pytest.raises(ValueError, match="begun with, gone differ; choose another folder"):
        command._same_settings(tmp_path, DemoSettings())
