# SPDX-License-Identifier: MIT
"""Tools, their meanings and the world they act on."""

import random
from collections import Counter

from kimi_ops.agentic.specs import (
    DOMAINS,
    HELD_OUT_DOMAINS,
    OPERATORS,
    TICKET,
    Domain,
    base_tools,
    is_held_out,
    repository,
)
from kimi_ops.agentic.words import HELD_OUT_SHARE, held_out, word, words
from kimi_ops.agentic.world import BUSY, DONE, NOT_FOUND, World
from kimi_ops.models.kimi_k2.chat import ToolCall, check_arguments
from kimi_ops.models.kimi_k2.chat.tool_schema import check_schema

LAMPS = Domain("home", "lamps", "lamp", ("level", "color"))
TOOLS = {tool.name: tool for tool in reversed(base_tools(LAMPS))}  # of two columns the first


def lamps(busy: int = 0, **rows: str) -> World:
    rows = rows or {"oak": "7", "elm": "3"}
    table = {
        name: {"level": level, "color": f"c{level}", TICKET: f"t{level}"}
        for name, level in rows.items()
    }
    return World(tuple(TOOLS.values()), {"lamps": table}, busy)


def test_every_op_reads_and_changes_what_it_says():
    world = lamps()
    before = world.digest()
    assert world.call("level_get", {"lamp": "oak"}) == "7"
    assert world.call("level_get", {"lamp": "ash"}) == NOT_FOUND
    assert world.call("level_find", {"level": "3"}) == "elm"
    assert world.call("level_find", {"level": "9"}) == NOT_FOUND
    assert world.call("lamps_count", {"level": "3"}) == "1"
    assert world.call("level_sum", {}) == "10"
    assert world.digest() == before
    assert world.call("level_set", {"lamp": "oak", "level": "3"}) == DONE
    assert world.call("lamps_count", {"level": "3"}) == "2"
    assert world.call("lamp_move", {"lamp": "oak", "level": "3"}) == "already there"
    assert world.call("lamp_move", {"lamp": "oak", "level": "4"}) == DONE
    assert world.call("lamp_add", {"lamp": "oak"}) == "already there"
    assert world.call("lamp_add", {"lamp": "ash"}) == DONE
    assert world.tables["lamps"]["ash"] == {"color": "", "level": "", TICKET: ""}
    assert world.call("lamp_cancel", {"lamp": "elm"}) == DONE
    assert sorted(world.tables["lamps"]) == ["ash", "oak"]


def test_the_digest_is_of_the_end_and_not_of_the_way():
    one, other = lamps(), lamps()
    one.call("level_set", {"lamp": "oak", "level": "1"})
    one.call("level_set", {"lamp": "elm", "level": "2"})
    other.call("level_set", {"lamp": "elm", "level": "2"})
    other.call("level_get", {"lamp": "oak"})
    assert one.digest() != other.digest()
    other.call("level_set", {"lamp": "oak", "level": "1"})
    assert one.digest() == other.digest()
    copied = one.copy()
    copied.call("lamp_cancel", {"lamp": "oak"})
    assert one.digest() == other.digest() != copied.digest()


def test_faults_come_as_often_as_they_were_asked_for():
    world = lamps(busy=2)
    copied = world.copy()
    asked = [world.call("level_get", {"lamp": "oak"}) for _ in range(3)]
    assert asked == [BUSY, BUSY, "7"]
    assert [copied.call("level_get", {"lamp": "oak"}) for _ in range(3)] == asked


def test_what_is_wrong_with_a_call_is_its_answer():
    world = lamps()
    broken = ToolCall("functions.x:0", "x", "{", malformed="the arguments are no JSON")
    assert world.answer(broken) == "error: the arguments are no JSON"
    undeclared = ToolCall("functions.x:0", "x", "{}", {}, complaints=("x is not declared",))
    assert world.answer(undeclared) == "error: x is not declared"
    good = ToolCall("functions.level_get:0", "level_get", "{}", {"lamp": "elm"})
    assert world.answer(good) == "3"


def evolved(name: str, operator: str):
    return list(OPERATORS[operator](TOOLS[name], random.Random(3)))


def test_evolved_tools_do_what_they_declare():
    world = lamps()
    world.tools = evolved("level_get", "split")
    first, second = world.tools
    assert first.semantics.column == TICKET and second.parameters["required"] == [TICKET]
    ticket = world.call(first.name, {"lamp": "elm"})
    assert ticket == "t3" and world.call(second.name, {TICKET: ticket}) == "3"

    world.tools = evolved("level_set", "merge")
    name = world.tools[0].name
    assert world.call(name, {"lamp": "elm"}) == "3"
    assert world.call(name, {"lamp": "elm", "level": "8"}) == DONE
    assert world.call(name, {"lamp": "elm"}) == "8"

    world.tools = [*evolved("level_set", "precondition"), TOOLS["level_get"]]
    assert world.call("level_set", {"lamp": "oak", "level": "1"}) == "error: look it up first"
    world.call("level_get", {"lamp": "oak"})
    assert world.call("level_set", {"lamp": "oak", "level": "1"}) == DONE

    world.tools = evolved("color_get", "optional")
    field = world.tools[0].semantics.fallback
    assert world.call("color_get", {"lamp": "ash", field: "red"}) == "red"
    assert world.call("color_get", {"lamp": "ash"}) == NOT_FOUND

    (narrow,) = evolved("level_set", "enum")
    choices = narrow.parameters["properties"]["level"]["enum"]
    assert len(choices) == 3
    assert check_arguments({"lamp": "oak", "level": "1"}, narrow.parameters)
    assert not check_arguments({"lamp": "oak", "level": choices[1]}, narrow.parameters)

    (renamed,) = evolved("level_get", "rename field")
    new = renamed.semantics.column
    assert renamed.name == f"{new}_get" and new in renamed.domain.columns
    (verb,) = evolved("level_get", "rename verb")
    assert verb.name != "level_get" and verb.name.startswith("level_")


def test_operators_leave_alone_what_they_have_nothing_to_do_with():
    for operator in ("optional", "split", "merge", "enum", "precondition"):
        assert not OPERATORS[operator](TOOLS["level_sum"], random.Random(0))


def test_the_repository_has_no_two_alike_and_every_operator():
    tools = repository(2000, seed=0)
    assert len(tools) >= 2000
    assert len({tool.shape for tool in tools}) == len(tools)
    assert tools == repository(2000, seed=0) != repository(2000, seed=1)
    used = Counter(name for tool in tools for name in tool.lineage)
    assert set(used) == set(OPERATORS) and min(used.values()) > 30
    assert {tool.domain.category for tool in tools} == {domain.category for domain in DOMAINS}
    for tool in tools:
        check_schema(tool.parameters)
        meaning, fields = tool.semantics, tool.parameters["properties"]
        assert {meaning.key, meaning.value, meaning.fallback} - {""} == set(fields)


def test_what_is_held_out_is_by_domain_or_by_operator():
    tools = repository(2000)
    held = [tool for tool in tools if is_held_out(tool)]
    assert {tool.semantics.table for tool in held} >= set(HELD_OUT_DOMAINS)
    assert all(
        tool.semantics.table in HELD_OUT_DOMAINS or tool.semantics.op == "use" for tool in held
    )
    rest = {tool.semantics.table for tool in tools if not is_held_out(tool)}
    assert len(rest) == len(DOMAINS) - len(HELD_OUT_DOMAINS)


def test_a_fifth_of_all_words_is_kept_from_training():
    rng = random.Random(0)
    drawn = {word(rng, fresh=rng.random() < 0.5) for _ in range(50)}
    assert {held_out(one) for one in drawn} == {True, False}
    made = {f"{a}{b}" for a in words(rng, 60, fresh=False) for b in "abcdefgh"}
    assert abs(sum(map(held_out, made)) / len(made) - HELD_OUT_SHARE) < 0.06
    some = words(rng, 40, fresh=True)
    assert all(map(held_out, some))
    assert not any(a != b and a.startswith(b) for a in some for b in some)
