# SPDX-License-Identifier: MIT
"""Kimi K2's chat format: the text, ids that no message can forge, what is trained on."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.models.kimi_k2.chat import (
    ByteTokenizer,
    TransformersTokenizer,
    declare_typescript,
    load_tokenizer,
)
from kimi_ops.models.kimi_k2.chat.dialogue import DEFAULT_SYSTEM, MARKERS, render

# The format once more, as a template: what is between tags is trimmed but for one line end.
TEMPLATE = """\
{%- macro body(m) -%}
{%- if m.content is string -%}{{ m.content }}
{%- elif m.content -%}{%- for part in m.content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- if messages[0].role != 'system' -%}
<|im_system|>system<|im_middle|>DEFAULT<|im_end|>{{ '\\n' }}
{%- endif -%}
{%- for m in messages -%}
{%- set own = {'user': 'user', 'assistant': 'assistant'}.get(m.role, 'system') -%}
<|im_{{ own }}|>{{ m.name or m.role }}<|im_middle|>
{%- if m.role == 'tool' -%}## Return of {{ m.tool_call_id }}{{ '\\n' }}{%- endif -%}
{{ body(m) }}
{%- if m.tool_calls -%}
<|tool_calls_section_begin|>
{%- for call in m.tool_calls -%}
{%- set given = call.function.arguments -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
{%- if given is string -%}{{ given }}{%- else -%}{{ given | tojson }}{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
""".replace("DEFAULT", DEFAULT_SYSTEM)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather, in °C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
]
USER = {"role": "user", "content": "Zürich?"}


def call(arguments, ident="functions.get_weather:0", name="get_weather"):
    function = {"name": name, "arguments": arguments}
    return {"id": ident, "type": "function", "function": function}


def result(content, ident="functions.get_weather:0", **more):
    return {"role": "tool", "tool_call_id": ident, "content": content, **more}


FIRST = call('{"city":"Zürich" }')
SECOND = call({"city": "Bern", "days": [1, 2.5]}, "functions.get_weather:1")
STARTS = {
    "none": [],
    "own": [{"role": "system", "content": "Short."}],
    "silent": [{"role": "system"}],
}
TURNS = {
    "user": [USER],
    "empty": [{"role": "user", "content": ""}],
    "named": [{**USER, "name": "Ann"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": t} for t in "a\nb"]}],
    "spaces": [{"role": "user", "content": "  \n two lines \n"}],
    "answer": [USER, {"role": "assistant", "content": "11 °C"}, {"role": "user", "content": "?"}],
    "call": [USER, {"role": "assistant", "content": "So:", "tool_calls": [FIRST]}, result("11")],
    "null": [USER, {"role": "assistant", "content": None, "tool_calls": [FIRST]}],
    "two": [
        USER,
        {"role": "assistant", "tool_calls": [FIRST, SECOND]},
        result("11", name="get_weather"),
        result("9\n", "functions.get_weather:1", name="get_weather"),
    ],
    "rounds": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [FIRST]},
        result(""),
        {"role": "assistant", "content": "", "tool_calls": [SECOND]},
        result([{"type": "text", "text": "{}"}], "functions.get_weather:1"),
        {"role": "assistant", "content": "Done."},
    ],
}
CONVERSATIONS = {f"{s}-{t}": STARTS[s] + TURNS[t] for s, t in product(STARTS, TURNS)}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_text_equals_the_template(messages, tools):
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    ordered = json.loads(json.dumps(tools, sort_keys=True))
    for prompt in (False, True):
        (expected,), _ = rendering.render_jinja_template(
            [messages], tools=ordered, chat_template=TEMPLATE, add_generation_prompt=prompt
        )
        assert render(messages, tools, generation_prompt=prompt).text == expected


def test_a_whole_conversation():
    assert render(CONVERSATIONS["none-two"], TOOLS, generation_prompt=True).text == (
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"description":"Weather, in °C","name":'
        '"get_weather","parameters":{"properties":{"city":{"type":"string"}},"type":"object"}},'
        '"type":"function"}]<|im_end|>'
        "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI."
        "<|im_end|>\n"
        "<|im_user|>user<|im_middle|>Zürich?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city":"Zürich" }<|tool_call_end|>'
        "<|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>"
        '{"city": "Bern", "days": [1, 2.5]}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n11<|im_end|>"
        "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:1\n9\n<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )


def test_calls_are_numbered_through_the_dialogue():
    messages = [
        USER,
        {
            "role": "assistant",
            "tool_calls": [call("{}", "call_a1"), call("{}", "search:2", "s.t-u")],
        },
        result("two", "search:2"),
        result("one", "call_a1"),
        {"role": "assistant", "tool_calls": [call("{}", "call_a1"), call("{}", "call_a1", "b")]},
        result("three", "call_a1"),
        result("four", "call_a1"),
    ]
    text = render(messages).text
    heads = [part.split("<|tool_call_argument_begin|>")[0] for part in text.split("call_begin|>")]
    assert heads[1:] == [
        "functions.get_weather:0", "functions.s.t-u:1", "functions.get_weather:2", "functions.b:3",
    ]  # fmt: skip
    found = [part.split("<|im_end|>")[0] for part in text.split("## Return of ")[1:]]
    assert found == [
        "functions.s.t-u:1\ntwo", "functions.get_weather:0\none",
        "functions.get_weather:2\nthree", "functions.b:3\nfour",
    ]  # fmt: skip
    assert messages[1]["tool_calls"][0]["id"] == "call_a1"  # the caller's stay


def test_what_is_trained_on():
    chat = render(CONVERSATIONS["own-rounds"], TOOLS, generation_prompt=True)
    marked = "".join(c if on else "\0" for c, on in zip(chat.text, chat.trained, strict=True))
    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|><|im_end|>"
    assert [part for part in marked.split("\0") if part] == [
        f"{begin}<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f'{{"city":"Zürich" }}<|tool_call_end|>{end}',
        f"{begin}<|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>"
        f'{{"city": "Bern", "days": [1, 2.5]}}<|tool_call_end|>{end}',
        "Done.<|im_end|>",
    ]
    ids, mask = chat.encode(ByteTokenizer())
    trained = ByteTokenizer().decode([one for one, on in zip(ids, mask, strict=True) if on])
    assert trained == marked.replace("\0", "")


def test_declarations_in_typescript():
    text = render([USER], TOOLS, declare=declare_typescript).text
    head = f"<|im_system|>tool_declare<|im_middle|>{declare_typescript(TOOLS)}<|im_end|>"
    assert text.startswith(head)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected at least one"),
        ([{"role": "developer", "content": ""}], "role: expected system"),
        (["Hello"], "role: expected system"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], 'an object with a "function"'),
        ([{"role": "user", "content": "", "images": [1]}], "got images"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "K2 reads text"),
        ([{"role": "user", "tool_calls": [FIRST]}], "tool_calls: expected none"),
        ([{"role": "assistant", "tool_calls": [call("{}", name="")]}], "function.name"),
        ([{"role": "assistant", "tool_calls": [call(None)]}], "function.arguments"),
        (
            [{"role": "assistant", "tool_calls": [{**FIRST, "type": "x"}]}],
            "type: expected function",
        ),
        ([USER, result("11")], "the id of a call before it"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        render(messages)


# Tokenizers


def bpe(template=TEMPLATE):
    """A byte-level tokenizer of transformers; tool markers are added, not special, as K2's are."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["user assistant system functions weather return"] * 9, trainer)
    inner.add_special_tokens([AddedToken(marker) for marker in MARKERS[:5]])
    inner.add_tokens([AddedToken(marker, special=False) for marker in MARKERS[5:]])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


@pytest.fixture(scope="module", params=["bytes", "transformers", "no template"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    template = TEMPLATE if request.param == "transformers" else None
    return TransformersTokenizer(bpe(template), "made here")


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_ids_hold_the_text(tokenizer, messages):
    chat = tokenizer.render(messages, TOOLS, generation_prompt=True)
    ids, mask = chat.encode(tokenizer)
    assert tokenizer.decode(ids) == chat.text and len(mask) == len(ids)
    assert [p.marker for p in chat.pieces] == [p.text in MARKERS for p in chat.pieces]
    if not isinstance(tokenizer, TransformersTokenizer):
        return
    inner = tokenizer._tokenizer
    assert ids == inner.encode(chat.text, add_special_tokens=False)
    if inner.chat_template:
        options = {"tools": TOOLS, "add_generation_prompt": True, "return_dict": False}
        assert ids == inner.apply_chat_template(messages, **options)


@pytest.mark.parametrize("marker", MARKERS)
def test_no_text_forges_a_marker(tokenizer, marker):
    def conversation(text):
        return [
            {"role": "system", "content": text},
            {"role": "user", "content": f"a{text}b", "name": text},
            {"role": "assistant", "content": text, "tool_calls": [call({text: text}), call(text)]},
            result(text, name=text),
        ]

    tools = [{"type": "function", "function": {"name": marker, "description": f"{marker}x"}}]
    real = set(tokenizer.markers.values())
    chat = tokenizer.render(conversation(marker), tools)
    ids, mask = chat.encode(tokenizer)
    honest = tokenizer.render(conversation("t"), TOOLS)
    other, _ = honest.encode(tokenizer)
    assert [one for one in ids if one in real] == [one for one in other if one in real]
    assert [p.trained for p in chat.pieces] == [p.trained for p in honest.pieces]
    assert tokenizer.decode(ids) == chat.text and chat.text.count(marker) > 9
    assert real.isdisjoint(tokenizer.encode(marker)) and any(mask)


def test_a_template_of_another_revision_is_used_as_it_is():
    other = TEMPLATE.replace("tool_declare<|im_middle|>", "tool_declare<|im_middle|>\n# Tools\n")
    made = TransformersTokenizer(bpe(other), "made here")
    text = made.render([USER], TOOLS).text
    assert "# Tools\n[{" in text and text != render([USER], TOOLS).text


def test_special_tokens_are_bytes_that_no_text_holds():
    tokenizer = ByteTokenizer()
    assert [f"{one:X}" for one in tokenizer.markers.values()] == [
        "F5", "F6", "F7", "F8", "F9", "FA", "FB", "FC", "FD", "FE",
    ]  # fmt: skip
    names = "im_end im_user im_assistant im_system im_middle tool_calls_section_begin "
    names += "tool_calls_section_end tool_call_begin tool_call_argument_begin tool_call_end"
    assert [f"<|{name}|>" for name in names.split()] == list(tokenizer.markers)
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
    assert set(tokenizer.encode(every)).isdisjoint(tokenizer.markers.values())
    assert tokenizer.decode(tokenizer.encode(every)) == every
    assert tokenizer.decode([0xF5, 65, 0xFE], skip_special_tokens=True) == "A"
    with pytest.raises(ValueError, match="256"):
        tokenizer.decode([256])
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 0xF4) | st.integers(0x80, 0xBF), max_size=12))
def test_a_stream_of_bytes_gives_the_text_of_all(ids):
    tokenizer = ByteTokenizer()
    stream = tokenizer.text_stream()
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)
    assert stream.feed(65) == "A"  # nothing of it is left


def test_a_stream_holds_characters_back_until_they_are_whole():
    for tokenizer in (ByteTokenizer(), TransformersTokenizer(bpe(), "made here")):
        stream = tokenizer.text_stream()
        parts = [stream.feed(one) for one in tokenizer.encode("a€ü😀") + tokenizer.encode("€")[:2]]
        assert [part for part in parts if part] == ["a", "€", "ü", "😀"]
        assert stream.flush() == "\ufffd"


def test_the_tokenizer_of_a_folder(tmp_path):
    config = {**KimiK2Config.mini().to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).source.startswith("bytes")
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    with pytest.raises(ValueError, match="a vocabulary of 320"):
        load_tokenizer(tmp_path)
    bpe().save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert "of transformers" in found.source and str(tmp_path) in found.source
    assert found.render([USER]).text == render([USER]).text
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 290}))
    with pytest.raises(ValueError, match="at most the 290 tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"~": 500}  # few tokens, but one with an id beyond the embedding
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="at most the 320 tokens of the model, got id 500 for '~'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="that transformers reads"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_serve_is_refused():
    made = bpe(None)
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    plain = type(made)(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"K2's special tokens, got no <\|im_end\|>"):
        TransformersTokenizer(plain, "made here")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match=r"<\|im_end\|> as ordinary text"):
        TransformersTokenizer(made, "made here")
    made = bpe(None)
    made.add_tokens([AddedToken("<x>", rstrip=True)])
    with pytest.raises(ValueError, match="between special tokens by itself"):
        TransformersTokenizer(made, "made here")
