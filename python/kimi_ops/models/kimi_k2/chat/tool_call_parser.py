# SPDX-License-Identifier: MIT
"""A model's turn read as it comes: content, and calls when they are complete.

    content <|tool_calls_section_begin|>
      <|tool_call_begin|> functions.find:0 <|tool_call_argument_begin|> {...} <|tool_call_end|> ...
    <|tool_calls_section_end|> <|im_end|>

A marker that is missing where the next one makes it clear is made up for; a call that cannot be
understood is kept with its text and the reason. From ids a marker is known for certain. From text
it is a spelling, and one inside a JSON string that ends as it should is a part of that string.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from kimi_ops.models.kimi_k2.chat.dialogue import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    IM_ASSISTANT,
    IM_END,
    IM_SYSTEM,
    IM_USER,
    MARKERS,
    SECTION_BEGIN,
    SECTION_END,
)
from kimi_ops.models.kimi_k2.chat.tool_calls import ToolCall, Turn, loaded, understood
from kimi_ops.models.kimi_k2.chat.tool_schema import check_schema, functions_of

__all__ = ["Event", "ToolCallParser", "TurnStream", "parse", "parse_ids"]

Event = str | ToolCall  # a part of the content, or a whole call
Tools = Sequence[Mapping[str, Any]] | None

# models write "section" in both numbers
_SINGULAR = {m.replace("calls", "call"): m for m in (SECTION_BEGIN, SECTION_END)}
_MEANT = {**{marker: marker for marker in MARKERS}, **_SINGULAR}
_MARKER = re.compile("|".join(map(re.escape, _MEANT)))
_IN_ARGUMENTS = re.compile(rf'(?P<marker>{_MARKER.pattern})|\\["\\]|"')
_ENDS = (IM_END, IM_USER, IM_ASSISTANT, IM_SYSTEM)  # what follows is another turn


class Decodes(Protocol):
    """A tokenizer, as far as a turn needs it."""

    @property
    def markers(self) -> Mapping[str, int]: ...

    def text_stream(self) -> Any: ...


def parse(text: str, tools: Tools = None) -> Turn:
    """The turn that a text spells; see :class:`ToolCallParser`.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.chat import parse
    >>> turn = parse(
    ...     "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
    ...     '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
    ... )
    >>> turn.content, turn.calls[0].name, turn.calls[0].arguments
    ('Let me see.', 'add', {'a': 1})
    """
    parser = ToolCallParser(tools)
    parser.feed(text)
    parser.close()
    return parser.turn


def parse_ids(ids: Iterable[int], tokenizer: Decodes, tools: Tools = None) -> Turn:
    """The turn in ids that a model sampled, in which no text can be taken for a marker."""
    stream = TurnStream(tokenizer, tools=tools)
    for one in ids:
        stream.feed(int(one))
    stream.end()
    return stream.turn


class ToolCallParser:
    """Reads an assistant's turn as it comes.

    Where ids are at hand, `text` and `marker` take what is certainly one or the other. `feed` takes
    text in which markers are spelled, in pieces of any size: the same turn whatever the pieces. It
    holds back what may still become a marker.

    Parameters
    ----------
    tools : sequence of mappings, optional
        What was declared: other calls, and arguments against the schemas, get complaints.

    Raises
    ------
    ValueError
        Declarations that are none.
    """

    def __init__(self, tools: Tools = None) -> None:
        self._functions = None if tools is None else functions_of(tools)
        for function in (self._functions or {}).values():
            check_schema(function.get("parameters") or True)
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._events: list[Event] = []
        self._ended = False
        self._in_section = False
        self._between: list[str] = []  # text in a section and outside of calls
        self._id: list[str] | None = None  # of the call that is open
        self._arguments: list[str] | None = None  # of it, once they have begun
        # spelled text
        self._held, self._at = "", 0  # what is not decided yet begins at this place
        self._in_string = False
        self._doubtful: int | None = None  # where in the arguments a marker stands in a string

    @property
    def turn(self) -> Turn:
        """What there is so far."""
        return Turn("".join(self._content), list(self._calls), self._ended)

    def feed(self, text: str) -> list[Event]:
        """Take more text, in which markers are spelled; what it completes."""
        if self._ended:
            return []
        self._held, self._at = self._held[self._at :] + text, 0
        self._run()
        return self.events()

    def close(self) -> list[Event]:
        """Take the end of the turn; what was still open."""
        while self._doubtful is not None and not self._is_whole():
            self._go_back()
            self._run()
        self.text(self._held[self._at :])
        self._held, self._at = "", 0
        self._finish("the text ends within the call")
        return self.events()

    def text(self, text: str) -> None:
        """Take ordinary text, whatever it spells."""
        if not text or self._ended:
            return
        if self._id is not None:
            (self._id if self._arguments is None else self._arguments).append(text)
        elif self._in_section:
            self._between.append(text)
        else:
            self._content.append(text)
            self._events.append(text)

    def marker(self, spelling: str) -> None:
        """Take a special token."""
        marker = _MEANT.get(spelling)
        if self._ended:
            return
        if marker in _ENDS:
            self._finish("the turn ends within the call")
            self._ended = True
        elif marker == SECTION_BEGIN:
            self._finish("a section begins within the call")
            self._in_section = True
        elif marker == SECTION_END:
            self._finish("the section ends within the call")
            self._in_section = False
        elif marker == CALL_BEGIN:
            self._finish("another call begins within the call")
            self._id = []
        elif marker == CALL_END:
            if self._id is not None:
                self._finish(None)
        elif marker == ARGUMENT_BEGIN and self._id is not None and self._arguments is None:
            self._arguments = []
        elif self._id is not None:  # a part of what makes it malformed
            self.text(spelling)

    def events(self) -> list[Event]:
        """What was completed since this was last asked."""
        events, self._events = self._events, []
        return events

    def _finish(self, broken_off: str | None) -> None:
        """Close the call, or the text between calls."""
        stray, self._between = "".join(self._between), []
        if stray.strip():
            self._add(ToolCall("", "", stray, malformed="text in the section outside of a call"))
        if self._id is None:
            return
        text = None if self._arguments is None else "".join(self._arguments)
        self._add(understood("".join(self._id), text, self._functions, broken_off))
        self._id = self._arguments = self._doubtful = None
        self._in_string = False

    def _add(self, call: ToolCall) -> None:
        self._calls.append(call)
        self._events.append(call)

    def _run(self) -> None:
        """Take what is held, as far as it is decided what is a marker."""
        going = True
        while going and not self._ended:
            going = self._to_marker() if self._arguments is None else self._through_arguments()

    def _to_marker(self) -> bool:
        """Take text and the marker behind it; False where there is none yet."""
        found = _MARKER.search(self._held, self._at)
        end = found.start() if found else len(self._held) - _unsure(self._held, self._at)
        self.text(self._held[self._at : end])
        self._at = found.end() if found else end
        if found:
            self.marker(found[0])
        return found is not None

    def _through_arguments(self) -> bool:
        """The same in arguments, where strings may spell markers."""
        assert self._arguments is not None
        decided = self._at
        for found in _IN_ARGUMENTS.finditer(self._held, self._at):
            decided = found.end()
            if found[0] == '"':
                self._in_string = not self._in_string
            if not found["marker"]:
                continue
            self._arguments.append(self._held[self._at : found.start()])
            self._at = found.start()
            if self._in_string:
                if self._doubtful is None:
                    self._doubtful = sum(map(len, self._arguments))
            elif self._doubtful is not None and not self._is_whole():
                self._go_back()
                return True
            else:
                self._at = found.end()
                self.marker(found[0])
                return True
        end = len(self._held) - _unsure(self._held, decided, escapes=True)
        self._arguments.append(self._held[self._at : end])
        self._at = end
        return False

    def _is_whole(self) -> bool:
        return isinstance(loaded("".join(self._arguments or ()))[0], dict)

    def _go_back(self) -> None:
        """The first marker inside a string ends the call after all: the string is never closed."""
        assert self._arguments is not None and self._doubtful is not None
        self._held = "".join(self._arguments) + self._held[self._at :]
        found = _MARKER.match(self._held, self._doubtful)
        assert found is not None
        self._arguments = [self._held[: found.start()]]
        self._at = found.end()
        self._in_string, self._doubtful = False, None
        self.marker(found[0])


def _unsure(text: str, start: int, escapes: bool = False) -> int:
    """How many characters at the end may be the beginning of a marker, or of an escape."""
    if escapes and text.endswith("\\", start):
        return 1
    place = text.rfind("<", max(start, len(text) - max(map(len, _MEANT))))
    tail = text[place:] if place >= 0 else ""
    return len(tail) if tail and any(one.startswith(tail) for one in _MEANT) else 0


class TurnStream:
    """A streamer for `KimiK2.generate`, of one sequence.

    Parameters
    ----------
    tokenizer : with ``markers`` and ``text_stream()``
    tell : callable, optional
        Given parts of the content as they come, and calls when they are complete.
    tools : sequence of mappings, optional
        As of :class:`ToolCallParser`.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        tell: Callable[[Event], None] | None = None,
        tools: Tools = None,
    ) -> None:
        self._parser = ToolCallParser(tools)
        self._markers = {place: spelling for spelling, place in tokenizer.markers.items()}
        self._text = tokenizer.text_stream()
        self._tell = tell
        self._in_prompt = True

    @property
    def turn(self) -> Turn:
        """What there is so far."""
        return self._parser.turn

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is passed over, then the ids of a step."""
        if not self._in_prompt and value.numel() != 1:
            raise ValueError(
                f"TurnStream: value: expected the next id of one sequence, got {value.numel()}; "
                "generate one at a time"
            )
        if not self._in_prompt:
            self.feed(int(value))
        self._in_prompt = False

    def feed(self, token_id: int) -> None:
        """Take an id."""
        marker = self._markers.get(token_id)
        self._parser.text(self._text.flush() if marker else self._text.feed(token_id))
        if marker:
            self._parser.marker(marker)
        self._pass_on(self._parser.events())

    def end(self) -> None:
        """Take the end of the sequence."""
        self._parser.text(self._text.flush())
        self._pass_on(self._parser.close())

    def _pass_on(self, events: list[Event]) -> None:
        for event in events:
            if self._tell is not None:
                self._tell(event)
