# SPDX-License-Identifier: MIT
"""What an assistant wrote in its turn: content, and calls with what is wrong with them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_ops.models.kimi_k2.chat.dialogue import ARGUMENT_BEGIN
from kimi_ops.models.kimi_k2.chat.tool_schema import check_arguments

__all__ = ["ToolCall", "Turn", "understood"]


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it.

    Attributes
    ----------
    id, name : str
        ``functions.get_weather:0`` and the tool's name in it, empty where there is none.
    text : str
        Of the arguments, as they were written.
    arguments : dict or None
        None where the call is malformed.
    malformed : str or None
        Why it cannot be carried out by anyone.
    complaints : tuple of str
        A tool that was not declared, arguments against its schema.
    """

    id: str
    name: str
    text: str
    arguments: dict[str, Any] | None = None
    malformed: str | None = None
    complaints: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return self.malformed is None and not self.complaints


@dataclass(frozen=True)
class Turn:
    """All that an assistant wrote in its turn.

    Attributes
    ----------
    content : str
    calls : list of ToolCall
    ended : bool
        Whether it came to ``<|im_end|>``.
    """

    content: str
    calls: list[ToolCall]
    ended: bool

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a message for the dialogue; calls without a name are not in it."""
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.text},
            }
            for call in self.calls
            if call.name
        ]
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        return {**message, "tool_calls": calls} if calls else message


def understood(
    id_text: str,
    text: str | None,
    functions: Mapping[str, Mapping[str, Any]] | None = None,
    broken_off: str | None = None,
) -> ToolCall:
    """The call that an id and arguments make.

    Parameters
    ----------
    id_text, text : str
        As they were written; no `text` where no arguments began.
    functions : mapping, optional
        The declared functions by name.
    broken_off : str, optional
        What came instead of the end of the call.
    """
    id_text, written = id_text.strip(), text or ""
    head, _, number = id_text.rpartition(":")
    regular = number.isascii() and number.isdigit()
    name = (head if regular else id_text).removeprefix("functions.")
    arguments, reason = loaded(written)
    if text is None:
        reason = f"no {ARGUMENT_BEGIN} behind the id"
    elif reason is None and not isinstance(arguments, dict):
        reason = f"the arguments are no object: {_short(written.strip())}"
    if reason is not None and broken_off is not None:
        reason = f"{broken_off}; {reason}"
    if reason is None and not (regular and name):
        reason = f"the id is not functions.NAME:NUMBER: {_short(id_text)!r}"
    if reason is not None:
        return ToolCall(id_text, name, written, malformed=reason)
    complaints: list[str] = []
    if functions is not None and name not in functions:
        known = ", ".join(functions) or "nothing"
        complaints = [f"{_short(name)} is not declared; declared: {known}"]
    elif functions is not None:
        complaints = check_arguments(arguments, functions[name].get("parameters") or True)
    return ToolCall(id_text, name, written, arguments, complaints=tuple(complaints))


def loaded(text: str) -> tuple[Any, str | None]:
    """JSON, or why it is none."""
    try:
        value = json.loads(text, parse_constant=_refused)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        return None, "the arguments are nested too deeply"
    except UnicodeEncodeError:
        return None, "the arguments hold half of a surrogate pair, which is no character"
    except ValueError as error:
        return None, f"the arguments are no JSON: {error}"
    return value, None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
