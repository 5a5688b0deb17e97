# SPDX-License-Identifier: MIT
"""Tool calls read from what a model writes: whole, in any pieces, from text and from ids."""

import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.chat import (
    ByteTokenizer,
    ToolCall,
    ToolCallParser,
    TurnStream,
    parse,
    parse_ids,
)
from kimi_ops.models.kimi_k2.chat.dialogue import MARKERS, render

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, DONE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
STOP = "<|im_end|>"


def call(ident, arguments):
    return f"{CALL}{ident}{ARGUMENTS}{arguments}{DONE}"


TWO = call("functions.a:0", '{"x": 1}') + call("functions.b:1", "{}")
A, B = ("a", {"x": 1}), ("b", {})
# what a model writes, its content, the calls: name and arguments, or the reason
WRITTEN = {
    "nothing": ("", "", []),
    "content": (f"Hi.\n{STOP}", "Hi.\n", []),
    "calls": (f"So:{BEGIN}{TWO}{END}{STOP}", "So:", [A, B]),
    "singular": (f"{BEGIN}{TWO}{END}{STOP}".replace("calls_s", "call_s"), "", [A, B]),
    "no section end": (f"{BEGIN}{TWO}{STOP}", "", [A, B]),
    "cut off behind a call": (f"{BEGIN}{TWO}", "", [A, B]),
    "no section": (f"x{TWO}y{STOP}", "xy", [A, B]),
    "no call end": (f"{BEGIN}{TWO}{END}".replace(DONE, ""), "", [A, B]),
    "two sections": (f"a{BEGIN}{call('b:0', '{}')}{END}b{BEGIN}{TWO}{END}c", "abc", [B, A, B]),
    "line ends": (
        f"{BEGIN}\n{CALL}\nfunctions.a:0\n{ARGUMENTS}\n{{}}\n{DONE}\n{END}\n{STOP}",
        "\n",
        [("a", {})],
    ),
    "names": (
        BEGIN + "".join(call(f"{n}:0", "{}") for n in ("functions.a-b.c", "get_x", "functions.1")),
        "",
        [("a-b.c", {}), ("get_x", {}), ("1", {})],
    ),
    "braces": (
        BEGIN + call("functions.a:0", '{"a": {"b": [{}, "}{"]}, "c": "\\"}"}'),
        "",
        [("a", {"a": {"b": [{}, "}{"]}, "c": '"}'})],
    ),
    "markers in strings": (
        BEGIN + call("a:0", json.dumps({"x": DONE + END, CALL: f'"{DONE}\\'})) + TWO + END,
        "",
        [("a", {"x": DONE + END, CALL: f'"{DONE}\\'}), A, B],
    ),
    "stray markers": (f"a{DONE}b{END}c{ARGUMENTS}d<|im_middle|>e{STOP}", "abcde", []),
    "another turn": (f"a{BEGIN}{TWO}<|im_user|>user<|im_middle|>b{STOP}", "a", [A, B]),
    "behind the end": (f"a{STOP}b{STOP}{BEGIN}{TWO}", "a", []),
    "no marker": ("a <|im_ e|> <|tool_call <| tool_call_begin|>", None, []),
    "cut off in arguments": (f"{BEGIN}{CALL}a:0{ARGUMENTS}{{", "", ["the text ends within the"]),
    "cut off in a string": (
        f"{BEGIN}{CALL}a:0{ARGUMENTS}" + '{"a": "<|tool',
        "",
        ["the text ends within the call; the arguments are no JSON"],
    ),
    "cut off in the id": (f"{BEGIN}{CALL}functions.a", "", ["the text ends within the call; no"]),
    "not JSON": (f"{BEGIN}{call('a:0', '{x: 1}')}{TWO}", "", ["the arguments are no JSON", A, B]),
    "no object": (f"{BEGIN}{call('a:0', '[1]')}", "", ["the arguments are no object: [1]"]),
    "empty": (f"{BEGIN}{call('a:0', '')}{TWO}", "", ["the arguments are no JSON", A, B]),
    "no number": (f"{BEGIN}{call('functions.a', '{}')}", "", ["the id is not functions.NAME:N"]),
    "no name": (f"{BEGIN}{call('functions.:0', '{}')}", "", ["the id is not functions.NAME:N"]),
    "no arguments": (f"{BEGIN}{CALL}a:0{DONE}{TWO}", "", [f"no {ARGUMENTS} behind the id", A, B]),
    "arguments twice": (
        f"{BEGIN}{CALL}a:0{ARGUMENTS}{{}}{ARGUMENTS}{{}}{DONE}{TWO}",
        "",
        ["the arguments are no JSON", A, B],
    ),
    "text in the section": (
        f"{BEGIN} a:0 {{}} {TWO}?{END}",
        "",
        ["text in the section outside of a call", A, B, "text in the section"],
    ),
    "an open string": (
        BEGIN + call("a:0", '{"x": "y}') + TWO + END + STOP,
        "",
        ["the arguments are no JSON", A, B],
    ),
    "an open string, then strings": (
        BEGIN + call("a:0", '{"x": "y}') + call("b:1", '{"z": "}"}') + TWO + END + "x",
        "x",
        ["the arguments are no JSON", ("b", {"z": "}"}), A, B],
    ),
    "an open string at the end": (
        BEGIN + call("a:0", '{"x": "y}') + call("b:1", "{}") + END + STOP,
        "",
        ["the arguments are no JSON", ("b", {})],
    ),
    "open strings": (
        BEGIN + call("a:0", '{"x') + call("a:0", '{"x\\') + call("a:0", '{"x') + TWO + STOP,
        "",
        ["the arguments are no JSON"] * 3 + [A, B],
    ),
    "not a number": (BEGIN + call("a:0", '{"x": NaN}'), "", ["NaN is no number of JSON"]),
    "infinity": (BEGIN + call("a:0", '{"x": 1e999}'), "", ["the arguments are no JSON: Out of"]),
    "surrogates": (BEGIN + call("a:0", '{"x": "\\ud800"}'), "", ["half of a surrogate pair"]),
    "too deep": (f"{BEGIN}{call('a:0', '[' * 9999)}", "", ["nested too deeply"]),
}  # fmt: skip


def seen(calls):
    return [(c.name, c.arguments) if c.malformed is None else c.malformed for c in calls]


def agree(turn, content, calls):
    found = seen(turn.calls)
    assert turn.content == content and len(found) == len(calls)
    for one, expected in zip(found, calls, strict=True):
        assert expected in one if isinstance(expected, str) else one == expected


@pytest.mark.parametrize(("text", "content", "calls"), WRITTEN.values(), ids=WRITTEN.keys())
def test_what_a_model_writes(text, content, calls):
    turn = parse(text)
    agree(turn, text if content is None else content, calls)
    assert turn.ended == any(end in text for end in (STOP, "<|im_user|>"))
    for marker in MARKERS:
        assert marker not in turn.content


def pieces(text, cuts):
    places = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


def streamed(parts):
    parser = ToolCallParser()
    events = [event for part in parts for event in parser.feed(part)] + parser.close()
    turn = parser.turn
    assert "".join(e for e in events if isinstance(e, str)) == turn.content
    assert [e for e in events if isinstance(e, ToolCall)] == turn.calls
    return turn


@pytest.mark.parametrize("text", [text for text, _, _ in WRITTEN.values()], ids=WRITTEN.keys())
def test_every_split_gives_the_same_turn(text):
    text = text if len(text) < 999 else text[-700:]
    whole = parse(text)
    assert streamed(text) == whole
    for cut in range(len(text) + 1):
        assert streamed(pieces(text, [cut])) == whole


WORDS = [*MARKERS, "{", "}", '"', "\\", '"x":', "1", "a:0", "<|", "|>", "<|tool_call", " ", "ü\n"]
WORDS += ['{"x": "', '"}', "{}", BEGIN + CALL + "functions.a:0" + ARGUMENTS]


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=25).map("".join), st.data())
def test_any_text_in_any_pieces_gives_the_same_turn(text, data):
    whole = parse(text)
    assert streamed(text) == whole
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert streamed(pieces(text, cuts)) == whole
    assert not any(marker in whole.content for marker in MARKERS)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 255) | st.integers(0xF5, 0xFE), max_size=40))
def test_any_bytes_are_read(ids):
    turn = parse_ids(ids, ByteTokenizer())
    assert all((call.arguments is None) == (call.malformed is not None) for call in turn.calls)
    if 0xF5 in ids:
        assert turn.ended


def test_half_a_character_ends_where_a_marker_begins():
    assert parse_ids([65, 0xC3, 0xF5], ByteTokenizer()).content == "A\ufffd"
    call = parse_ids([0xFA, 0xFC, *b"a:0", 0xFD, *b"{}", 0xE2, 0xFE, 66, 0xFB], ByteTokenizer())
    assert [one.text for one in call.calls] == ["{}\ufffd", "B"]


def test_content_comes_at_once_and_markers_never():
    parser = ToolCallParser()
    assert parser.feed("Let me <") == ["Let me "]
    assert parser.feed("3 see.<|tool_calls_sec") == ["<3 see."]
    assert parser.feed("tion_begin|>\n<|tool_call_begin|>functions.a:0") == []
    assert parser.feed(f"{ARGUMENTS}{{}}{DONE}{CALL}b:1") == [
        ToolCall("functions.a:0", "a", "{}", {})
    ]
    assert parser.feed(f"{ARGUMENTS}{{}}") == []
    assert parser.close() == [ToolCall("b:1", "b", "{}", {})]


# Round trips


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
spelled = st.lists(texts | st.sampled_from(WORDS), max_size=3).map("".join)
plain = spelled.filter(lambda text: not any(m in text for m in [*MARKERS, "<|tool_call_section"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-9, 9) | spelled,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(spelled, inner, max_size=2),
    max_leaves=5,
)
names = st.from_regex(r"[\w.-]{1,9}", fullmatch=True)
made = st.lists(st.tuples(names, st.dictionaries(spelled, values, max_size=3)), max_size=3)


def conversation(content, calls):
    calls = [{"function": {"name": n, "arguments": arguments}} for n, arguments in calls]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    return [{"role": "user", "content": "?"}, message]


@settings(max_examples=50, deadline=None)
@given(plain, made)
def test_what_is_rendered_is_read_back(content, calls):
    chat = render(conversation(content, calls))
    written = "".join(p.text for p in chat.pieces if p.trained)
    turn = parse(written)
    assert (turn.content, seen(turn.calls), turn.ended) == (content, calls, True)
    assert render([conversation("", [])[0], turn.message]).text == chat.text


@settings(max_examples=50, deadline=None)
@given(spelled, made, spelled)
def test_what_is_rendered_is_read_back_from_ids(content, calls, verbatim):
    tokenizer = ByteTokenizer()
    chat = render(conversation(content, [*calls, ("verbatim", verbatim)]))
    ids, mask = chat.encode(tokenizer)
    turn = parse_ids([one for one, on in zip(ids, mask, strict=True) if on], tokenizer)
    assert turn.content == content and turn.calls[-1].text == verbatim and turn.ended
    assert seen(turn.calls[:-1]) == calls


# Tools


PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": "a", "parameters": PARAMETERS}}]


def test_calls_are_held_against_the_declarations():
    text = BEGIN + TWO + call("a:2", "{}") + call("a:3", '{"x": "1"}') + call("b:4", "{")
    good, undeclared, missing, wrong, malformed = parse(text, TOOLS).calls
    assert good.valid and good.arguments == {"x": 1}
    assert undeclared.complaints == ("b is not declared; declared: a",)
    assert undeclared.arguments == {} and not undeclared.valid and undeclared.malformed is None
    assert missing.complaints == ("arguments: expected x, which is missing",)
    assert wrong.complaints == ('arguments.x: expected integer, got "1"',)
    assert malformed.malformed and not malformed.complaints and not malformed.valid
    assert parse(text, []).calls[0].complaints == ("a is not declared; declared: nothing",)
    bare = [{"type": "function", "function": {"name": "b"}}]
    assert parse(BEGIN + TWO, bare).calls[1].valid


def test_declarations_that_cannot_be_checked_are_refused_at_once():
    broken = {"type": "function", "function": {"name": "a", "parameters": {"oneOf": []}}}
    with pytest.raises(ValueError, match="oneOf"):
        ToolCallParser([broken])


def test_a_message_keeps_malformed_calls_that_have_a_name():
    turn = parse(f"x{BEGIN}?{call('functions.a:7', '{')}{call('b', '{}')}{STOP}")
    assert [one["function"] for one in turn.message["tool_calls"]] == [
        {"name": "a", "arguments": "{"}, {"name": "b", "arguments": "{}"},
    ]  # fmt: skip
    assert "tool_calls" not in parse("x").message


def test_time_is_linear_in_length():
    many = BEGIN + call("functions.a:0", json.dumps({"x": ["<|tool_call_end|>\\"] * 20})) * 1000
    long = BEGIN + call("functions.a:0", json.dumps({"x": "y<|\\" * 100_000}))
    start = time.perf_counter()
    assert len(parse(many).calls) == 1000 and parse(many).calls[-1].malformed is None
    assert len(streamed(pieces(long, range(0, len(long), 3))).calls[0].arguments["x"]) == 400_000
    assert time.perf_counter() - start < 20  # where a step copies all of it: minutes


# Generation


def test_calls_come_while_a_model_generates():
    model = KimiK2(KimiK2Config.mini()).eval()
    tokenizer = ByteTokenizer()
    head = [{"role": "user", "content": "?"}]
    prompt, _ = render(head, TOOLS, generation_prompt=True).encode(tokenizer)
    ids, mask = render(conversation("Zü", [("a", {"x": 3}), ("b", {})])).encode(tokenizer)
    script = [one for one, on in zip(ids, mask, strict=True) if on]

    def scripted(ids, logits):
        forced = torch.full_like(logits, -torch.inf)
        forced[:, script[ids.shape[1] - len(prompt)]] = 0.0
        return forced

    events = []
    stream = TurnStream(tokenizer, events.append, TOOLS)
    model.generate(
        torch.tensor([prompt]),
        max_new_tokens=len(script) + 9,
        eos_token_id=tokenizer.markers[STOP],
        logits_processor=[scripted],
        streamer=stream,
    )
    assert events == ["Z", "ü", *stream.turn.calls]
    agree(stream.turn, "Zü", [("a", {"x": 3}), ("b", {})])
    assert stream.turn.ended and stream.turn.calls[1].complaints
    with pytest.raises(ValueError, match="one sequence"):
        stream.put(torch.tensor([1, 2]))
