# SPDX-License-Identifier: MIT
"""Conversations as Kimi K2 reads them: messages and tools to text, and which of it to train on.

    <|im_system|>tool_declare<|im_middle|>[{"function":...}]<|im_end|>    where there are tools
    <|im_system|>system<|im_middle|>You are Kimi, ...<|im_end|>\\n         where there is no other
    <|im_user|>user<|im_middle|>...<|im_end|>
    <|im_assistant|>assistant<|im_middle|>...<|tool_calls_section_begin|>...<|im_end|>
    <|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\\n...<|im_end|>

The text is that of the released template, of its present revision, byte for byte. It is kept as
pieces, markers apart from text, so that no spelling of a marker in a message becomes one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from kimi_ops.models.kimi_k2.chat.tool_schema import declare_json

__all__ = ["Chat", "Encodes", "Piece", "normalised", "render"]

IM_END, IM_MIDDLE = "<|im_end|>", "<|im_middle|>"
IM_USER, IM_ASSISTANT, IM_SYSTEM = "<|im_user|>", "<|im_assistant|>", "<|im_system|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
MARKERS = (
    IM_END, IM_USER, IM_ASSISTANT, IM_SYSTEM, IM_MIDDLE,
    SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END,
)  # fmt: skip
DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

Message = Mapping[str, Any]
Declare = Callable[[Sequence[Mapping[str, Any]]], str]
_ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_HEADS = {"user": IM_USER, "assistant": IM_ASSISTANT}  # all others are the system's


class Encodes(Protocol):
    """A tokenizer, as far as a conversation needs it."""

    @property
    def markers(self) -> Mapping[str, int]:
        """Ids of the special tokens, by their spelling."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, whatever it spells."""


def _error(name: str, expected: str, came: object, mend: str) -> ValueError:
    return ValueError(f"render: {name}: expected {expected}, got {came}; {mend}")


@dataclass(frozen=True)
class Piece:
    """A marker, or text between two markers; `trained` where the model is to learn to write it."""

    text: str
    marker: bool
    trained: bool


@dataclass(frozen=True)
class Chat:
    """A conversation as text and as ids.

    Attributes
    ----------
    pieces : tuple of Piece
    """

    pieces: tuple[Piece, ...]

    @cached_property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def trained(self) -> list[bool]:
        """For each character of the text whether the model is to learn to write it: what stands
        behind the head of an assistant's message, up to its ``<|im_end|>`` and with it."""
        return [piece.trained for piece in self.pieces for _ in piece.text]

    def encode(self, tokenizer: Encodes) -> tuple[list[int], list[bool]]:
        """Ids, and which of them are trained on."""
        ids: list[int] = []
        mask: list[bool] = []
        for piece in self.pieces:
            ids += [tokenizer.markers[piece.text]] if piece.marker else tokenizer.encode(piece.text)
            mask += [piece.trained] * (len(ids) - len(mask))
        return ids, mask

    @classmethod
    def of(cls, parts: Sequence[str]) -> "Chat":
        """A conversation from markers and the texts between them, in turns: text at even places."""
        pieces, role, trained = [], "", False
        for place, part in enumerate(parts):
            marker = place % 2 == 1
            if part:
                pieces.append(Piece(part, marker, trained))
            if marker and part in (IM_USER, IM_ASSISTANT, IM_SYSTEM):
                role, trained = part, False
            elif marker and part in (IM_MIDDLE, IM_END):
                trained = part == IM_MIDDLE and role == IM_ASSISTANT
        return cls(tuple(pieces))


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    generation_prompt: bool = False,
    declare: Declare = declare_json,
) -> Chat:
    """A conversation in the format of Kimi K2.

    Parameters
    ----------
    messages : sequence of mappings
        As OpenAI's: `role` (system, user, assistant, tool), `content` (text, a list of text parts,
        or nothing), `name`, `tool_calls` of an assistant, `tool_call_id` of a tool's result.
        Arguments of a call that are a string stand there as they are, an object as JSON. Calls are
        numbered through the dialogue, ``functions.{name}:{number}``, and their results with them,
        whatever ids came: names are read from ids, and other forms mislead the model.
    tools : sequence of mappings, optional
        Declarations ``{"type": "function", "function": {"name", "description", "parameters"}}``.
    generation_prompt : bool
        Whether to end with the head of the assistant's next message.
    declare : callable
        The form of the declarations: `declare_json`, sorted and without spaces, or
        `declare_typescript`, as Kimi K2.5 has it.

    Returns
    -------
    Chat
        Its `text`, `trained` and ``encode(tokenizer)``.

    Raises
    ------
    ValueError
        A message, a call or a declaration that the format has no place for.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.chat import ByteTokenizer
    >>> from kimi_ops.models.kimi_k2.chat import render
    >>> system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    >>> chat = render([system, user])
    >>> chat.text
    '<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|>'
    >>> ids, trained = chat.encode(ByteTokenizer())
    >>> len(ids), any(trained)
    (27, False)
    """
    messages = normalised(messages)
    parts = [""]
    if tools:
        parts += [IM_SYSTEM, "tool_declare", IM_MIDDLE, declare(tools), IM_END, ""]
    if messages[0]["role"] != "system":
        parts += [IM_SYSTEM, "system", IM_MIDDLE, DEFAULT_SYSTEM, IM_END, "\n"]
    for message in messages:
        role = message["role"]
        parts += [_HEADS.get(role, IM_SYSTEM), message.get("name") or role, IM_MIDDLE]
        result = f"## Return of {message['tool_call_id']}\n" if role == "tool" else ""
        parts += [result + message["content"], *_section(message.get("tool_calls", ())), IM_END, ""]
    if generation_prompt:
        parts += [IM_ASSISTANT, "assistant", IM_MIDDLE, ""]
    return Chat.of(parts)


def _section(calls: Sequence[Message]) -> Iterator[str]:
    if not calls:
        return
    yield from (SECTION_BEGIN, "")
    for call in calls:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield from (CALL_BEGIN, call["id"], ARGUMENT_BEGIN, arguments, CALL_END, "")
    yield from (SECTION_END, "")


def normalised(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with content as text and with calls numbered through the dialogue.

    A result keeps to the latest call of its id; where one message has several calls of one id,
    results take them in turn.

    Raises
    ------
    ValueError
        As :func:`render`.
    """
    if not messages:
        raise _error("messages", "at least one", "none", "begin with a user's message")
    found, count = [], 0
    ids: dict[str, list[str]] = {}  # as they came -> as they are numbered
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        _check(message, where)
        made: dict[str, Any] = {"role": message["role"], "content": _content(message, where)}
        if message.get("name"):
            made["name"] = message["name"]
        if message.get("tool_calls"):
            calls, fresh = [], dict[str, list[str]]()
            for number, call in enumerate(message["tool_calls"]):
                function = _function(call, f"{where}.tool_calls[{number}]")
                made_id = f"functions.{function['name']}:{count}"
                fresh.setdefault(call.get("id") or made_id, []).append(made_id)
                calls.append({"id": made_id, "type": "function", "function": function})
                count += 1
            made["tool_calls"] = calls
            ids.update(fresh)
        if message["role"] == "tool":
            numbered = ids.get(message.get("tool_call_id", ""))
            if numbered is None:
                raise _error(
                    f"{where}.tool_call_id",
                    "the id of a call before it",
                    repr(message.get("tool_call_id")),
                    "pass the id that the assistant's call has",
                )
            made["tool_call_id"] = numbered.pop(0) if len(numbered) > 1 else numbered[0]
        found.append(made)
    return found


def _check(message: Message, where: str) -> None:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in _ROLES:
        raise _error(f"{where}.role", " | ".join(_ROLES), repr(role), "choose one")
    unknown = sorted(key for key in message if key not in _KEYS and message[key])
    if unknown:
        raise _error(where, ", ".join(sorted(_KEYS)), ", ".join(unknown), "leave it out")
    for key, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if message.get(key) and role != owner:
            raise _error(f"{where}.{key}", f"none in a message of role {role}", "some", "remove it")


def _content(message: Message, where: str) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or isinstance(part, Mapping) and part.get("type") != "text":
            raise _error(
                f"{where}.content", "text or parts of type text", part, "K2 reads text alone"
            )
        texts.append(text)
    return "".join(texts)


def _function(call: Message, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise _error(where, 'an object with a "function"', call, "write it as OpenAI's")
    name, arguments = function.get("name"), function.get("arguments")
    if call.get("type", "function") != "function":
        raise _error(f"{where}.type", "function", call["type"], "K2 calls functions alone")
    if not isinstance(name, str) or not name:
        raise _error(f"{where}.function.name", "a name", repr(name), "name the tool")
    if not isinstance(arguments, str | Mapping):
        raise _error(
            f"{where}.function.arguments",
            "an object or its JSON",
            type(arguments).__name__,
            "pass {} for none",
        )
    return {"name": name, "arguments": arguments}
