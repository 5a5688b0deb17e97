# SPDX-License-Identifier: MIT
"""The supervised stage, and the command that runs all stages."""

import dataclasses
import json
import random
import re
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from kimi_ops.agentic import demo as command
from kimi_ops.agentic import sft, stages
from kimi_ops.agentic.demo import DemoSettings, demo, small_config
from kimi_ops.agentic.drills import recall, repeats, search, wishes
from kimi_ops.agentic.learner import Learner, token_losses
from kimi_ops.agentic.lookups import lookups
from kimi_ops.agentic.results import WAYS
from kimi_ops.agentic.rl import Rl, RlSettings
from kimi_ops.agentic.sft import Sft, SftSettings, batch_of, packed
from kimi_ops.agentic.specs import LOOK_UP, usage
from kimi_ops.agentic.synthesis import training_tools
from kimi_ops.agentic.tasks import NO_TOOL
from kimi_ops.agentic.world import BUSY
from kimi_ops.cli import app
from kimi_ops.models.kimi_k2.chat import ByteTokenizer
from kimi_ops.models.kimi_k2.chat.dialogue import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_SYSTEM,
    IM_USER,
)
from tests.agentic.agentic_parts import refused, tiny

EXAMPLE = ([10, 11, 12, 13, 14], [False, False, True, True, False])


def test_rows_are_of_one_length():
    ids, learnt, there = batch_of([EXAMPLE, ([20, 21, 22], [True, False, True])])
    assert ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]]
    # of all ids but the first
    assert learnt.tolist() == [[False, True, True, False], [False, True, False, False]]
    assert there.tolist() == [[True] * 4, [True, True, False, False]]


def test_examples_are_packed_one_after_the_other():
    ids, learnt = packed(lambda rng: EXAMPLE, random.Random(0), 7)
    assert ids == [10, 11, 12, 13, 14, 10, 11, 12]
    assert learnt == [False, False, True, True, False, False, False, True]


def test_the_loss_is_of_what_is_learnt_and_a_little_of_everything(monkeypatch):
    """Of ids that nobody learns the weight is small, of those behind an example's end zero."""
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    own = ((2 + 4) / 2 + 32 / 1) / 2  # rows weigh the same
    everything = (1 + 2 + 4 + 8 + 16 + 32) / 6
    run = stage(rest=0.25)
    told, taken = [], []
    monkeypatch.setattr(sft, "token_losses", lambda logits, ids: losses)
    monkeypatch.setattr(Learner, "step", lambda self, loss, factor: taken.append(float(loss())))
    monkeypatch.setattr(sft, "packed", lambda *_: None)
    rows = [EXAMPLE, ([20, 21, 22], [True, False, True])]
    monkeypatch.setattr(sft, "batch_of", lambda _: batch_of(rows))
    told.append(run.step().loss)
    assert taken == [pytest.approx(own + 0.25 * everything)] and told == [pytest.approx(own)]


def test_token_losses_are_cross_entropies():
    logits, ids = torch.randn(2, 3, 5), torch.randint(5, (2, 4))
    expected = -logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_losses(logits, ids), expected)


@pytest.mark.parametrize("length", [48, 96])
def test_a_repeat_is_decided_by_what_comes_before(length):
    for seed in range(20):
        ids, learnt = repeats(random.Random(seed), length)
        period = learnt.index(True)
        assert ids[period:] == ids[:-period] and len(ids) >= 2 * period
        assert all(learnt[period:]) and len(ids) == len(learnt)


def test_what_is_recalled_stood_there():
    for seed in range(20):
        ids, learnt = recall(random.Random(seed), 5)
        text = bytes(ids).decode()
        head, _, asked = text.rpartition(" ")
        pairs = dict(pair.split("=") for pair in head.split(" "))
        for question in asked.removesuffix(".").split("."):
            key, value = question.split("=")
            assert pairs[key] == value
        values = bytes(one for one, on in zip(ids, learnt, strict=True) if on).decode()
        assert values == "".join(f"{q.split('=')[1]}." for q in asked.split(".")[:-1])


def test_the_beginning_of_a_name_asks_for_it_and_its_fields():
    tokenizer, counts = ByteTokenizer(), Counter()
    for seed in range(20):
        ids, learnt = search(random.Random(seed), 3)
        lines = tokenizer.decode(ids).splitlines()
        known, found = fields_of("\n".join(lines[:3]), True), ""
        assert len(known) == 3
        for line in lines[3:]:
            question, _, answer = line.partition("?")
            said, _, call = answer.partition(CALL_BEGIN)
            about, *values = question.split(" ")
            name, _, arguments = call.partition(f":0{ARGUMENT_BEGIN}")
            assert name.startswith(f"{about}_")
            taken = json.loads(arguments)
            assert list(taken.values()) == values and list(taken) == list(known[name])
            counts[len(taken)] += 1
            assert said == usage(name, taken)
            found += f"{said}{CALL_BEGIN}{name}:" + "".join(
                f'{field}"{value}"' for field, value in taken.items()
            )
        assert tokenizer.decode([one for one, on in zip(ids, learnt, strict=True) if on]) == found
    assert set(counts) == {1, 2}


TURN = re.compile(
    rf"({re.escape(IM_USER)}|{re.escape(IM_SYSTEM)})(?:\w+{re.escape(IM_MIDDLE)})?(.*?)"
    rf"{re.escape(IM_END + IM_ASSISTANT)}(?:assistant)?{re.escape(IM_MIDDLE)}(.*?"
    rf"{re.escape(IM_END)})",
    re.DOTALL,
)


def fields_of(declared: str, short: bool) -> dict[str, dict[str, list[str]]]:
    """Of each declared tool its fields, and what they may be where not everything."""
    if short:
        declared = declared.replace("\ntype", "").replace(f" {LOOK_UP}", "")
        found = re.findall(r"(\w+)(?:: ([\w, ]+))? (\1_\w+)", declared)
        return {name: {f: [] for f in said.split(", ") if f} for _, said, name in found}
    found = re.findall(r"type (\w+) = \(_: \{(.*?)\}\)", declared, re.DOTALL)
    return {
        name: {
            field: re.findall(r'"(\w+)"', kind)
            for field, kind in re.findall(r"(\w+)\??: (.*)", inside)
        }
        for name, inside in found
    }


@pytest.mark.parametrize("short", [True, False])
def test_a_wish_is_answered_by_its_whole_calls(short):
    """Calls keep to what is declared, say first what they are of, and hold the user's words; of
    all kinds of wishes there are some. The assistant's turns are learnt, with their ends."""
    tools, tokenizer, kinds = training_tools(), ByteTokenizer(), Counter()
    verbs, unheard, places = {tool.name.rpartition("_")[2] for tool in tools}, 0, set()
    for seed in range(90):
        ids, learnt = wishes(random.Random(seed), tools, 3, short=short)
        declared, _, talk = tokenizer.decode(ids).partition(IM_USER)
        fields, turns = fields_of(declared, short), TURN.findall(IM_USER + talk)
        assert len(fields) == 3 and "".join(own for *_, own in turns) == tokenizer.decode(
            [one for one, on in zip(ids, learnt, strict=True) if on]
        )
        unheard += sum(name.rpartition("_")[2] not in verbs for name in fields)
        usages = fields_of(declared, True)
        heard, number, unsaid, before, waits = "", 0, 0, [], ""
        talks, asked = [set()], ""  # names called for each wish; what was asked back
        for role, said, own in turns:
            calls = re.findall(r"functions\.(\w+):(\d+)<.*?>(\{.*?\})<", own)
            made = [(name, json.loads(arguments)) for name, _, arguments in calls]
            *others, said = said.split(IM_END)
            said = said.rpartition(IM_MIDDLE)[2].removeprefix(IM_SYSTEM)
            head, _, result = said.partition("\n")
            heard += result or said
            assert [int(n) for _, n, _ in calls] == [*range(number, number + len(calls))]
            about = own.partition("<")[0].replace(f" {LOOK_UP}", "")
            then, _, about = about.rpartition(" after ")
            assert not made or about == "; ".join(usage(*one) for one in made)
            for name, arguments in made:
                assert list(arguments) == list(usages[name])
                said_so = name.rpartition("_")[0] in heard
                assert said_so or not result  # what only has to be called before is not said
                unsaid += not said_so
                for field, value in arguments.items():
                    allowed = fields[name][field]
                    assert value in heard and (not allowed or value in allowed)
            if head.startswith("## Return of "):
                assert role == IM_SYSTEM
                assert head == f"## Return of functions.{before[-1][0]}:{number - 1}"
                assert len(others) == len(before) - 1
                for other in others:
                    name, _, first = other.rpartition("\n")
                    assert name.endswith(f"## Return of functions.{before[0][0]}:{number - 2}")
                    result = f"{first}, {result}"
                    kinds["both"] += 1
                if result == BUSY:
                    assert made == before and not then
                    kinds["again"] += 1
                elif made:
                    assert len(made) == 1 and made[0][0] != before[0][0]
                    assert waits == made[0][0].rpartition("_")[0]
                    kinds["chain"] += 1
                    places.add([*fields].index(before[0][0]))
                    unsaid -= before[0][0].rpartition("_")[0] not in heard
                else:
                    assert own == result + IM_END and not waits
                    kinds["after"] += 1
            elif asked:
                assert role == IM_USER and made[0][1][asked] == said
            else:
                assert role == IM_USER
                talks.append(set())
                assert len({name for name, _ in made}) == len(made)
                kinds["two calls" if len(made) == 2 else "none" if NO_TOOL in own else "call"] += 1
            asked = "".join(re.findall(r"^to which (\w+)\?", own))
            kinds["asks"] += bool(asked)
            talks[-1] |= {name for name, _ in made}
            number, before, waits = number + len(made), made, then
        called = [name for names in talks for name in names]
        assert len(called) == len(set(called))  # each tool is wished for once
        assert not unsaid
    assert all(
        kinds[kind] >= 8 for kind in ("two calls", "none", "asks", "chain", "after", "both")
    ), kinds
    assert 0.3 < kinds["chain"] / 90 < 0.5
    assert kinds["call"] > 60 and kinds["again"] >= 3
    assert 0.3 < unheard / (3 * 90) < 0.5 and places == {0, 1, 2}


def stage(steps: int = 8, **options) -> Sft:
    settings = SftSettings(steps=steps, size=64, warmup=2, easy=0.75, **options)
    return Sft(Learner(tiny(0), 0.01), [EXAMPLE] * 4, settings)


def test_rows_beside_trajectories_have_their_shares():
    """Each mark stands for its source: 1 trajectories, 2 text, 3 pairs, letters drills."""
    run = Sft(
        Learner(tiny(0), 0.01),
        [([1] * length, [True] * length) for length in range(40, 50)],
        SftSettings(steps=1000, size=480, longest=45),
        text=lambda rng: ([2], [True]),
        pairs=[([3], [True])],
    )
    run.made = 999  # no longer easy
    batches = [run._trajectories() for _ in range(300)]
    rows = [row for rows in batches for row in rows]
    shares = [sum(ids[0] == mark for ids, _ in rows) / len(rows) for mark in (1, 2, 3)]
    assert shares == pytest.approx([0.3, 0.05, 0.15], abs=0.04)
    assert max(len(ids) for ids, _ in rows) == 44
    run.made = 0
    easy = [ids for _ in range(30) for ids, _ in run._trajectories()]
    assert max(map(len, easy)) == 42  # the shorter half


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, 0, "an int of at least 1") for name in ("steps", "longest", "size", "warmup")),
        ("rest", -0.1, "a number of at least 0.0"),
        ("easy", float("nan"), "a number of at least 0.0"),
        ("decay", 0.0, "a number above 0"),
    ],
)
def test_settings_that_train_nothing_are_refused(name, value, expected):
    refused(SftSettings, name, value, expected)


def test_trajectories_that_are_all_too_long_are_refused():
    long = ([1] * 45, [True] * 45)
    with pytest.raises(ValueError) as found:
        Sft(Learner(tiny(0), 0.01), [long], SftSettings(longest=45))
    assert str(found.value) == (
        "Sft: trajectories: expected some of less than 45 ids, got 1 of 45 and more; raise "
        "SftSettings.longest or make more attempts"
    )


def test_the_stage_learns_and_its_rate_rises_and_falls():
    settings = SftSettings(steps=100, warmup=10, decay=0.5)
    factors = [settings.factor(step) for step in range(100)]
    assert factors[0] == 0.1 and max(factors) == factors[20] == 1.0
    assert factors[-1] == pytest.approx(0.02) and factors[50:] == sorted(factors[50:])[::-1]
    run = stage(60)
    losses = [run.step() for _ in range(60)]
    assert run.finished
    names = ["repeats"] * 6 + ["recall"] * 7 + ["far recall"] * 5 + ["wishes"] * 18
    assert [made.stage for made in losses[:36]] == names
    last = losses[36:]
    assert {made.stage for made in last} == {"trajectories"}
    assert sum(made.loss for made in last[-5:]) < 0.5 * sum(made.loss for made in last[:5])
    assert {made.size for made in last} == {8, 16}  # half of the episodes at first


def test_a_stage_that_is_taken_up_again_goes_on_to_the_same_bits():
    whole, first = stage(), stage()
    losses = [whole.step().loss for _ in range(8)]
    assert [first.step().loss for _ in range(5)] == losses[:5]
    state = first.state_dict()
    second = stage()
    second.learner.model.init_weights(7)
    second.load_state_dict(state)
    assert [second.step().loss for _ in range(3)] == losses[5:]
    for one, other in zip(
        whole.learner.model.parameters(), second.learner.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


SMALL = DemoSettings(
    120,
    SftSettings(steps=4, size=640),
    RlSettings(steps=2, groups=2, told=1, tries=2, replayed=32, pairs=2, limit=500),
    episodes=1,
    tries=2,
    seed=3,
)


def test_every_stage_is_run_once(tmp_path, monkeypatch):
    lines: list[str] = []
    results = demo(tmp_path, SMALL, say=lines.append, bar=False, model=tiny)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results) == ["sft", "rl"]
    for stage in results.values():
        assert {tuple(stage[way]) for way in WAYS} == {("trained", "words", "domains")}
    assert lines[0].startswith("synthesis") and any("<|im_user|>user" in line for line in lines)
    steps = [json.loads(line) for line in (tmp_path / "rl.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    monkeypatch.setattr(Sft, "step", None)
    monkeypatch.setattr(Rl, "step", None)
    again = demo(tmp_path, SMALL, say=lines.append, bar=False, model=tiny)
    assert again == results
    table = next(line for line in lines if "in budget" in line).splitlines()
    assert len(table) == 1 + 2 * len(WAYS) * 3 + 2 and table[-1].startswith("rl          critic")
    with pytest.raises(ValueError, match="expected the settings it was begun with, seed differ"):
        demo(tmp_path, dataclasses.replace(SMALL, seed=4), bar=False, model=tiny)
    with pytest.raises(ValueError, match="stage: expected synthesis | sft | rl, got 'all'"):
        demo(tmp_path, SMALL, bar=False, model=tiny, last="all")


def test_a_run_ends_with_the_stage_that_is_named(tmp_path):
    assert demo(tmp_path, SMALL, say=str, bar=False, model=tiny, last="synthesis") == {}
    assert not (tmp_path / "sft.pt").exists()
    results = demo(tmp_path, SMALL, say=str, bar=False, model=tiny, last="sft")
    assert list(results) == ["sft"] and not (tmp_path / "rl.pt").exists()


@pytest.mark.parametrize(("broken", "at"), [(Sft, 4), (Rl, 1)])
def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(tmp_path, monkeypatch, broken, at):
    settings = dataclasses.replace(SMALL, sft=dataclasses.replace(SMALL.sft, steps=6))
    whole = demo(tmp_path / "whole", settings, say=str, bar=False, model=tiny)
    monkeypatch.setattr(stages, "SAVE_SFT", 2)
    step = broken.step

    def breaks(self):
        if self.made == at:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(broken, "step", breaks)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "broken", settings, say=str, bar=False, model=tiny)
    monkeypatch.setattr(broken, "step", step)
    again = demo(tmp_path / "broken", settings, say=str, bar=False, model=tiny)
    for results in (whole, again):
        for stage in results.values():
            del stage["seconds"]
    assert again == whole
    for name in ("sft.pt", "rl.pt"):
        one, other = (
            torch.load(tmp_path / run / name, weights_only=True)["model"]
            for run in ("whole", "broken")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_study_goes_on_from_one_supervised_model(tmp_path):
    arms = ("refined", "oracle")
    results = demo(tmp_path, SMALL, say=str, bar=False, model=tiny, arms=arms)
    assert list(results) == ["sft", "rl", "rl-oracle"]
    assert (tmp_path / "rl-oracle.jsonl").exists()


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch):
    options = ["agentic", "--out", str(tmp_path), "--attempts", "100", "--episodes", "1"]
    monkeypatch.setattr(
        command.demo, "__kwdefaults__", {**command.demo.__kwdefaults__, "model": tiny}
    )
    ran = CliRunner().invoke(app, [*options, "--steps", "2", "--stage", "sft"])
    assert ran.exit_code == 0 and "attempts kept" in ran.stdout
    ran = CliRunner().invoke(app, [*options, "--steps", "3"])
    assert ran.exit_code == 1 and "sft differ; choose another folder" in ran.stderr


def test_the_model_is_mini_on_bytes():
    config = small_config()
    assert config.vocab_size == 256 and config.rope_theta == 1000.0
    assert config.max_position_embeddings >= 1024


def test_look_ups_are_counted_by_split_and_number_of_tools():
    lines: list[str] = []
    settings = SftSettings(steps=3, size=640)
    found = lookups(tiny(0), settings, examples=20, episodes=2, say=lines.append, bar=False)
    assert list(found.found) == [(s, d) for s in ("trained", "words", "domains") for d in (1, 2)]
    assert all(set(score.success) == {"lookup"} for score in found.found.values())
    table = lines[0].splitlines()
    assert table[0] == f"trained in {found.seconds:.0f} s" and len(table) == 2 + 6


def test_the_command_teaches_look_ups_alone(monkeypatch):
    monkeypatch.setattr(command, "small_model", tiny)
    ran = CliRunner().invoke(
        app, ["agentic", "--lookups", "--seed", "3", "--steps", "2", "--episodes", "1"]
    )
    assert ran.exit_code == 0 and "domains        2" in ran.stdout
