# SPDX-License-Identifier: MIT
"""What a model may write in a tool section: the grammar of a schema, and whole turns."""

import json
import random

import pytest
import torch

from kimi_ops.models.kimi_k2.chat import ByteTokenizer, Enforcer, check_arguments, parse_ids, render
from kimi_ops.models.kimi_k2.chat.json_grammar import Places, json_grammar

IDS = ByteTokenizer().markers


def fields(properties, **more):
    return {"type": "object", "properties": properties, **more}


TEXT = {"type": "string", "maxLength": 4}
TREE = fields(
    {"name": TEXT, "parts": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
    required=["name"],
    additionalProperties=False,
)
# a schema, what it takes as it is written, what it does not
SCHEMAS = [
    ({"type": "string"}, ["", "aü€😀", '"\\/\n', "<|im_end|>"], [1]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü"], ["a", "abcd"]),
    ({"type": "integer"}, [0, -7, 1203], [1.5, "1"]),
    ({"type": "number"}, [0, -7.25, 0.001, 12], [None]),
    ({"type": ["boolean", "null"]}, [True, False, None], [0]),
    ({"enum": ["a", "ab", 3, None]}, ["a", "ab", 3, None], ["b", 4]),
    ({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [2]}]),
    ({"type": "array", "items": {"type": "null"}}, [[], [None], [None] * 3], [[1]]),
    ({"type": "array", "minItems": 2, "maxItems": 3}, [[1, "a"], [[], {}, 0]], [[1], [1] * 4, []]),
    ({"type": "array", "maxItems": 0}, [[]], [[1]]),
    (
        fields({"a": TEXT, "b": {}, "c": TEXT}, required=["b"]),
        [{"b": {"x": [1, None]}}, {"a": "", "b": 1}, {"a": "x", "b": 1, "c": "y"}],
        [{}, {"a": ""}, {"b": 1, "a": ""}, {"z": 1, "b": 1}],
    ),
    (fields({"a": TEXT, "b": TEXT}), [{}, {"b": ""}, {"a": ""}, {"a": "", "b": ""}], [{"c": ""}]),
    (fields({"a": False, "b": TEXT}, required=["c"]), [{"c": 1}, {"b": "", "c": 1}], [{"a": 1}]),
    (fields({}, additionalProperties=False), [{}], [{"a": 1}]),
    (fields({}), [{}], [{"a": 1}]),
    ({"type": "object", "additionalProperties": TEXT}, [{}, {"a": "x", "b": ""}], [{"a": 1}]),
    ({"anyOf": [{"type": "null"}, TEXT, {"type": "string"}]}, [None, "abcdef"], [1]),
    (TREE, [{"name": "a", "parts": [{"name": "b", "parts": []}]}], [{"parts": []}]),
    ({}, [{"a": [1, {"b": None}]}, "x", 1.5, []], []),
]


def places_behind(schema, text):
    places = Places.at_start(json_grammar(schema))
    for one in text.encode():
        places = places.behind(one)
    return places


@pytest.mark.parametrize(("schema", "good", "bad"), SCHEMAS)
def test_the_grammar_takes_what_fits(schema, good, bad):
    for value in good:
        assert not check_arguments(value, schema)
        places = places_behind(schema, json.dumps(value, ensure_ascii=False))
        assert places.at_end, value
    for value in bad:
        assert not places_behind(schema, json.dumps(value, ensure_ascii=False)).at_end, value


@pytest.mark.parametrize("schema", [schema for schema, _, _ in SCHEMAS])
def test_whatever_the_grammar_writes_fits(schema):
    draw = random.Random(0)
    for _ in range(10):
        places, written = Places.at_start(json_grammar(schema)), bytearray()
        while not places.at_end or (places.allowed and draw.random() < 0.5):
            closing = places.allowed & set(b'"}]')
            written.append(
                draw.choice(sorted(closing if closing and len(written) > 60 else places.allowed))
            )
            places = places.behind(written[-1])
        assert check_arguments(json.loads(written.decode()), schema) == []


def test_ways_that_meet_are_one():
    schema = {"type": "array", "items": {"anyOf": [{"type": "string"}] * 3}}
    places = places_behind(schema, "[" + ", ".join(['"ab"'] * 40) + ', "')
    assert len(places._stacks) < 60


TOOLS = [
    {"type": "function", "function": {"name": "grow-tree.x", "parameters": TREE}},
    {
        "type": "function",
        "function": {
            "name": "grow",
            "parameters": fields(
                {"n": {"enum": [1, 20]}, "on": {"type": "boolean"}}, required=["n"]
            ),
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": fields({})}},
]


def test_random_bytes_become_declared_calls_alone():
    tokenizer = ByteTokenizer()
    call = {"id": "x", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "x", "content": "12:00"},
    ]
    prompt, _ = render(messages, TOOLS, generation_prompt=True).encode(tokenizer)
    ids = torch.tensor([[*prompt, *b"So", IDS["<|tool_calls_section_begin|>"]]] * 8)
    generator, enforcer = torch.Generator().manual_seed(2), Enforcer(TOOLS)
    for _ in range(250):
        likely = enforcer(ids, torch.randn(8, 256, generator=generator)).softmax(-1)
        ids = torch.cat((ids, likely.multinomial(1, generator=generator)), 1)
    turns = [parse_ids(row[len(prompt) :], tokenizer, TOOLS) for row in ids.tolist()]
    assert sum(turn.ended for turn in turns) > 3
    calls = [call for turn in turns for call in turn.calls[: None if turn.ended else -1]]
    assert {call.name for call in calls} == {"grow-tree.x", "grow", "now"}
    assert all(call.valid for call in calls)
    for turn in turns:
        numbers = [int(call.id.rpartition(":")[2]) for call in turn.calls if call.valid]
        assert numbers == list(range(2, 2 + len(numbers))) and turn.content == "So"


def mask(enforcer, ids):
    return set(
        enforcer(torch.tensor([ids]), torch.zeros(1, 256))[0].isfinite().nonzero()[:, 0].tolist()
    )


def test_content_is_free_but_for_markers_that_cannot_stand_there():
    text = set(range(256)) - set(IDS.values()) | {IDS["<|im_end|>"]}
    assert mask(Enforcer(TOOLS), [65]) == text | {IDS["<|tool_calls_section_begin|>"]}
    assert mask(Enforcer([]), [65]) == text


def test_rows_are_followed_and_forgotten():
    enforcer = Enforcer(TOOLS)
    begin, call = IDS["<|tool_calls_section_begin|>"], IDS["<|tool_call_begin|>"]
    assert mask(enforcer, [65, begin]) == {call}
    assert mask(enforcer, [65, begin, call]) == {ord("f")}
    assert len(mask(enforcer, [65, 65])) > 200  # another text
    assert mask(enforcer, [begin, call, *b"functions.grow"]) == {ord(":"), ord("-")}
    assert mask(enforcer, [begin, call, *b"functions.now"]) == {ord(":")}
    with pytest.raises(ValueError, match="in row 0"):
        mask(enforcer, [begin, call, *b"functions.other"])
    with pytest.raises(ValueError, match="expected 256 bytes, got 300"):
        enforcer(torch.tensor([[1]]), torch.zeros(1, 300))
