# SPDX-License-Identifier: MIT
"""Tasks, the teacher, the judge and the pipeline that filters."""

import dataclasses
import json
import random
import re

import pytest

from kimi_ops.agentic import synthesis
from kimi_ops.agentic.episode import Episode
from kimi_ops.agentic.judge import OVER_BUDGET, judge, reward
from kimi_ops.agentic.specs import DOMAINS, HELD_OUT_DOMAINS, is_held_out, repository
from kimi_ops.agentic.style import JUSTIFICATIONS, PRAISE, plain
from kimi_ops.agentic.synthesis import read_attempts, synthesise, training_tools
from kimi_ops.agentic.tasks import FAMILIES, NO_TOOL, PLAIN, Call, make_task, subject
from kimi_ops.agentic.teacher import NOISE, play
from kimi_ops.agentic.users import PERSONAS, Wish, spoken
from kimi_ops.agentic.words import held_out, word, words
from kimi_ops.agentic.world import BUSY, NOT_FOUND
from kimi_ops.models.kimi_k2.chat import declare_typescript, parse, render
from kimi_ops.models.kimi_k2.chat.dialogue import IM_END

TOOLS = training_tools()


def tasks(family: str, count: int, **options):
    rng = random.Random(f"{family} {count}")
    return [make_task(family, TOOLS, rng, fresh=False, **options) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_of_every_family_does_its_task(family):
    for task in tasks(family, 60):
        episode = play(task, random.Random(0))
        assert episode.finished and judge(episode).kept, (judge(episode), episode.chat.text)
        assert task.world.digest() == Episode(task).world.digest()  # nothing played into it
        if family != "tell":
            assert reward(episode) == 1.0
        assert {t.name for t in task.tools} >= {call.tool for call in task.rubric.calls}
        assert len({tool.name for tool in task.tools}) == len(task.tools)


def test_families_are_what_they_are_called():
    for task in tasks("lookup", 20):
        assert len(task.rubric.calls) == 1 and task.rubric.goal == task.world.digest()
    changed = [task.rubric.goal != task.world.digest() for task in tasks("write", 20)]
    assert all(changed)
    for task in tasks("chain", 20):
        assert len(task.rubric.calls) == 2
        first, second = task.rubric.calls
        said = re.findall(r"\w+", " ".join(task.user))
        found = set(second.arguments.values()) - set(first.arguments.values())
        assert all(value in said for value in first.arguments.values())
        # what the first call finds is not said, or the second call could not have come first
        assert any(value not in said for value in found) or any(
            tool.semantics.looked_up for tool in task.tools
        )
    for task in tasks("none", 20):
        (answer,) = task.plan
        assert not task.rubric.calls and answer.endswith(f": {NO_TOOL}")
    faults = tasks("fault", 40)
    assert {task.world.busy for task in faults} == {0, 1, 2}
    assert {NOT_FOUND} == {task.plan[-1] for task in faults if not task.world.busy}
    for task in tasks("ask", 20):
        value = task.user[1]
        assert not task.user[0].endswith(f" {value}") and task.rubric.questions == 1
    for task in tasks("pair", 20):
        assert [len(step) for step in task.plan if not isinstance(step, str)] == [2]
    for task in tasks("tell", 20):
        assert task.rubric.outputs == ()


def test_the_teacher_says_what_a_call_is_about_in_words_of_the_user():
    """What the declaration says the tool is about: then choosing is copying."""
    for family in FAMILIES:
        for task in tasks(family, 20):
            episode = play(task, random.Random(0))
            said = re.findall(r"\w+", " ".join(task.user))
            last = subject(task.rubric.calls[-1].tool) if task.rubric.calls else ""
            for turn in episode.turns:
                about = [call.name.rpartition("_")[0] for call in turn.calls]
                if about:
                    usages = turn.content
                    if family == "chain" and turn is episode.turns[0]:
                        waits, _, usages = usages.partition(" after ")
                        assert waits == last
                    described = [
                        tool.declaration["function"]["description"]
                        for call in turn.calls
                        for tool in task.tools
                        if tool.name == call.name
                    ]
                    assert usages == "; ".join(described)
                if family in ("lookup", "write", "fault", "pair", "tell"):
                    assert set(about) <= set(said)
            if family == "none":
                about, _, answer = episode.turns[0].content.partition(": ")
                assert about in said and answer == NO_TOOL


@pytest.mark.parametrize("noise", NOISE)
def test_the_judge_sees_every_kind_of_error(noise):
    """But for the value of a "tell", which is not its to know."""
    seen = 0
    for family in FAMILIES:
        if family == "tell" and noise == "invented value":
            continue
        for task in tasks(family, 12):
            has_calls = bool(task.rubric.calls)
            if noise != "invented value" and not has_calls:
                continue
            if noise == "wrong tool" and len(task.tools) < 2:
                continue
            if noise == "letter off" and not any(c.arguments for c in task.rubric.calls):
                continue
            rng = random.Random(seen)
            episode = play(task, rng, noise)
            if noise == "letter off" and episode.chat.text == play(task, rng).chat.text:
                continue  # the call that was struck has no arguments
            assert not judge(episode).kept, (noise, family, episode.chat.text)
            seen += 1
    assert seen > 40


def test_rewards_ask_for_the_end_and_not_for_the_way():
    task = next(task for task in tasks("write", 20) if len(task.tools) > 1)
    good = play(task, random.Random(0))
    assert reward(good) == 1.0
    # the same end by a call more: the budget is all that counts
    wide = dataclasses.replace(task, rubric=dataclasses.replace(task.rubric, budget=10**6))
    (call,) = task.rubric.calls
    longer = play(
        dataclasses.replace(wide, plan=((call,), (call,), task.plan[-1])), random.Random(0)
    )
    assert (reward(longer) == 1.0) == (longer.world.digest() == task.rubric.goal)
    stray = dataclasses.replace(wide, plan=((Call("nothing", {}),), (call,), task.plan[-1]))
    beside = play(stray, random.Random(0))  # the end is right, a call is not of the declaration
    assert beside.world.digest() == task.rubric.goal and reward(beside) == 0.0
    short = dataclasses.replace(task, rubric=dataclasses.replace(task.rubric, budget=5))
    assert reward(play(short, random.Random(0))) == OVER_BUDGET
    for noise in ("wrong tool", "malformed call", "forgotten step", "invented value"):
        assert reward(play(wide, random.Random(1), noise)) == 0.0, noise


def test_style_counts_where_the_system_asks_for_it():
    task = tasks("lookup", 1)[0]
    wide = dataclasses.replace(task, rubric=dataclasses.replace(task.rubric, budget=10**6))
    strict = dataclasses.replace(wide, system=PLAIN)
    for seed in range(6):
        styled = play(strict, random.Random(seed), style=True)
        assert reward(styled) == 0.0 and judge(styled).kept
        assert reward(play(wide, random.Random(seed), style=True)) == 1.0
    assert reward(play(strict, random.Random(0))) == 1.0
    assert not set(PRAISE[True]) & set(PRAISE[False])
    for said in (*PRAISE[True], *PRAISE[False], *JUSTIFICATIONS[True], *JUSTIFICATIONS[False]):
        assert not plain(f"{said}oak") or not plain(f"oak{said}")
    assert plain("the level is 7") and plain(NO_TOOL) and plain(NOT_FOUND)


def test_a_broken_turn_ends_an_episode_and_is_no_success():
    task = tasks("lookup", 1)[0]
    episode = Episode(task)
    episode.take(["I think"])  # no end
    assert episode.finished and reward(episode) == 0.0
    assert "not finished" in judge(episode).reasons
    babble = Episode(task)
    babble.take(["", IM_END])
    assert babble.finished and reward(babble) == 0.0


def test_an_episode_is_the_text_of_its_messages():
    """Byte for byte that of the chat format, whatever the family and the faults."""
    for family in FAMILIES:
        for task in tasks(family, 10):
            episode = play(task, random.Random(0))
            declared = [tool.declaration for tool in task.tools]
            chat = render(episode.messages, declared, declare=declare_typescript)
            assert episode.chat.text == chat.text and episode.chat.trained == chat.trained
            for turn, message in zip(
                episode.turns,
                (m for m in episode.messages if m["role"] == "assistant"),
                strict=True,
            ):
                assert parse(turn.content, declared).content == message["content"]
            assert sum(chat.trained) >= episode.written


def test_no_wish_means_two_tools_that_do_not_the_same():
    """In two domains with two columns each most pairs of tools are near one another."""
    rng = random.Random(0)
    near = [tool for tool in repository(2000) if tool.semantics.table in HELD_OUT_DOMAINS]
    alike = 0
    for _ in range(400):
        one, other = make_task("lookup", near, rng, fresh=False, declared=2).tools
        said = {spoken(Wish(tool, "it"), rng, persona="terse") for tool in (one, other)}
        if len(said) == 1:
            alike += 1
            assert one.semantics.table == other.semantics.table
            assert one.semantics.by == other.semantics.by
    assert alike  # two tools that do the same may be


def test_every_persona_says_every_wish():
    ops = {tool.semantics.op for tool in TOOLS}
    for persona, said in PERSONAS.items():
        assert set(said) >= ops - {"use"}, persona
    for tool in repository(600):
        wish = Wish(tool, "oak", "elm")
        texts = {spoken(wish, random.Random(0), persona=persona) for persona in PERSONAS}
        assert len(texts) == len(PERSONAS)
        for text in texts:
            assert "{" not in text and ("oak" in text) == bool(tool.semantics.key)
    setter = next(tool for tool in TOOLS if tool.semantics.op == "set")
    assert spoken(Wish(setter, "oak"), random.Random(0)).endswith("of oak")


def test_the_pipeline_keeps_what_was_done_and_says_why_the_rest_is_not(tmp_path):
    path = tmp_path / "attempts.jsonl"
    *_, funnel = synthesise(path, 600)
    lines = read_attempts(path)
    assert [line["number"] for line in lines] == list(range(600))
    assert sum(funnel.attempts.values()) == 600
    kept = [line for line in lines if not line["reasons"]]
    assert len(kept) == sum(funnel.kept.values()) > 350
    assert set(funnel.missed) <= {"invented value"}  # of "tell", which nobody filters
    assert not +funnel.false
    assert all(line["family"] == "tell" for line in kept if line["noise"])
    assert {line["family"] for line in kept} == set(FAMILIES)
    assert sum(funnel.reasons.values()) + sum(funnel.crowded.values()) + len(kept) == 600


def test_no_word_that_is_held_out_stands_in_training_data(tmp_path):
    path = tmp_path / "attempts.jsonl"
    for _ in synthesise(path, 400):
        pass
    text = json.dumps([[line["messages"], line["tools"]] for line in read_attempts(path)])
    held = set(words(random.Random(0), 100, fresh=True))
    schema = {w for d in DOMAINS for w in (d.thing, d.table, *d.columns)}
    found = set(re.findall(r"[a-z]+", text)) - schema
    assert not found & held
    for line in read_attempts(path):
        for call in line["rubric"]["calls"]:
            for value in call["arguments"].values():
                assert not held_out(value) or value in schema, value
    private = {"renter", "keeper", "mood"}
    assert not private & set(re.findall(r"[a-z]+", text))
    assert {d.table for d in DOMAINS if set(d.columns) & private} == set(HELD_OUT_DOMAINS)
    assert not any(map(is_held_out, training_tools()))


def test_words_to_train_on_are_letters_by_chance_as_well():
    rng = random.Random(0)
    without_vowels = {
        fresh: sum(not set(word(rng, fresh=fresh)) & set("aeiou") for _ in range(1000))
        for fresh in (True, False)
    }
    assert without_vowels[True] == 0 and 40 < without_vowels[False] < 140


def test_a_broken_off_run_goes_on_to_the_same_bytes(tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    for _ in synthesise(whole, 120):
        pass
    for number, _ in enumerate(synthesise(broken, 120)):
        if number == 60:
            break
    content = whole.read_bytes()
    broken.write_bytes(content[: len(content) // 2])  # in the middle of a line
    *_, funnel = synthesise(broken, 120)
    assert broken.read_bytes() == content and sum(funnel.attempts.values()) == 120
    with pytest.raises(ValueError, match="expected the attempts of seed 1, got others from line 1"):
        list(synthesise(broken, 120, seed=1))
    assert broken.read_bytes() == content


def test_one_shape_does_not_crowd_out_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "SHAPE_LEAST", 2)
    *_, funnel = synthesise(tmp_path / "a.jsonl", 400)
    lines = read_attempts(tmp_path / "a.jsonl")
    assert sum(line["reasons"] == ["crowded"] for line in lines) == sum(funnel.crowded.values()) > 0


def test_busy_tools_are_tried_again():
    task = next(task for task in tasks("fault", 40) if task.world.busy == 2)
    episode = play(task, random.Random(0))
    answers = [m["content"] for m in episode.messages if m["role"] == "tool"]
    assert answers[:2] == [BUSY, BUSY] and len(answers) == 3
    assert json.dumps(episode.messages)  # plain data
