# SPDX-License-Identifier: MIT
"""The pictures of a run, from what its folder holds."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kimi_ops.agentic import figures
from kimi_ops.agentic.evaluate import SPLITS
from kimi_ops.agentic.figures import draw, funnel, plane
from kimi_ops.agentic.specs import repository
from kimi_ops.agentic.synthesis import read_attempts, synthesise
from kimi_ops.agentic.tasks import FAMILIES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for _ in synthesise(folder / "attempts.jsonl", 150, specs=900):
        pass
    way = {split: {"success": dict.fromkeys(FAMILIES, 0.5)} for split in SPLITS}
    results = {stage: {"greedy": way, "sampled": way} for stage in ("sft", "rl")}
    (folder / "results.json").write_text(json.dumps(results))
    names = ("reward", "success", "malformed", "budget", "entropy", "squared", "largest")
    rows = [{"step": n, "agreement": n / 5, **dict.fromkeys(names, n / 7)} for n in (1, 2, 3)]
    rows[1] |= {"agreement": None, "entropy": None, "squared": None, "largest": None}
    (folder / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_picture_is_drawn(run):
    paths = draw(run)
    assert [path.name for path in paths] == [
        "funnel.svg", "success.svg", "rl.svg", "critic.svg", "tools.svg",
    ]  # fmt: skip
    for path in paths:
        assert ET.parse(path).getroot().tag.endswith("svg")
    kept = sum(not line["reasons"] for line in read_attempts(run / "attempts.jsonl"))
    assert f"{kept} of 150 attempts kept" in (run / "funnel.svg").read_text()
    for family in FAMILIES:
        assert f">{family}<" in (run / "success.svg").read_text()


def test_bars_of_the_funnel_add_up_however_many_reasons_there_are(tmp_path):
    """More reasons than colours: the rarest in one bar."""
    names = ["", *(f"reason {n}" for n in range(10))]
    rows = [
        {"family": family, "reasons": [name] if name else []}
        for family, times in (("lookup", 1), ("write", 3))
        for n, name in enumerate(names)
        for _ in range(times * (len(names) - n))
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: dict[str, list[int]] = {}

    class Axes:
        def barh(self, families, widths, *, left, color, label):
            assert families == ["lookup", "write"] and label not in drawn
            assert left.tolist() == [sum(some) for some in zip(*drawn.values(), strict=True)] or (
                not drawn and left.tolist() == [0, 0]
            )
            drawn[label] = widths.tolist()

        def __getattr__(self, name):
            return lambda *_: None

    figures._funnel([Axes()], tmp_path)
    assert list(drawn) == ["kept", *names[1:7], "others"]
    assert drawn["kept"] == [11, 33] and drawn["others"] == [4 + 3 + 2 + 1, 30]
    assert [sum(some) for some in zip(*drawn.values(), strict=True)] == [66, 198]


def test_what_is_not_there_is_not_drawn(run, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_bytes((run / "results.json").read_bytes())
    (again,) = draw(tmp_path)
    assert again.name == "success.svg"
    assert again.read_bytes() == (run / "success.svg").read_bytes()  # to the byte
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="expected matplotlib.*pip install matplotlib"):
        draw(tmp_path)


def test_the_funnel_counts_every_attempt_once(run):
    lines = read_attempts(run / "attempts.jsonl")
    counted = funnel(lines)
    assert sum(one.total() for one in counted.values()) == len(lines)
    assert counted["lookup"]["kept"] == sum(
        line["family"] == "lookup" and not line["reasons"] for line in lines
    )


def test_tools_lie_where_their_letters_are():
    tools = repository(900)
    places = plane([*tools, tools[3]])
    assert places.shape == (len(tools) + 1, 2)
    np.testing.assert_allclose(places.mean(0), 0, atol=1e-8)
    np.testing.assert_allclose(places[-1], places[3], atol=1e-8)
    first, second = places.var(0)
    assert first > second > 0
    setters = np.array([tool.name.endswith("_set") for tool in [*tools, tools[3]]])
    apart = np.linalg.norm(places[setters].mean(0) - places[~setters].mean(0))
    assert apart > 0.3 * np.sqrt(second)
