# SPDX-License-Identifier: MIT
"""A conversation of an assistant with a task's user and world, turn by turn.

What the assistant writes stands in it as it was written, byte for byte: what is trained on is what
was said, never what a parser made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_ops.agentic.tasks import Task
from kimi_ops.models.kimi_k2.chat import Chat, Turn, declare_typescript, parse
from kimi_ops.models.kimi_k2.chat.dialogue import (
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_SYSTEM,
    IM_USER,
    SECTION_BEGIN,
)

__all__ = ["Episode"]


@dataclass
class Episode:
    """
    Attributes
    ----------
    task : Task
    parts : list of str
        Texts and markers so far, in turns, as `Chat.of` takes them.
    said : list of str
        The last of them, which others have said since the assistant's turn, in the same form.
    messages : list of dict
        The same as OpenAI's interface has it.
    turns : list of Turn
        What the assistant wrote.
    answers : list of str
        Of the world to the last turn's calls.
    finished : bool
        Whether nobody has anything to say.
    """

    task: Task
    parts: list[str] = field(init=False)
    said: list[str] = field(init=False)
    messages: list[dict[str, Any]] = field(init=False)
    turns: list[Turn] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.world = self.task.world.copy()
        self._declared = [tool.declaration for tool in self.task.tools]
        self._users = iter(self.task.user)
        self.parts, self.said = [""], [""]
        self.messages = [{"role": "system", "content": self.task.system}]
        self._say(IM_SYSTEM, "tool_declare", declare_typescript(self._declared))
        self._say(IM_SYSTEM, "system", self.task.system)
        self._user_speaks()

    @property
    def chat(self) -> Chat:
        return Chat.of(self.parts)

    @property
    def written(self) -> int:
        """Bytes of the assistant; markers count one."""
        return sum(
            1 if piece.marker else len(piece.text.encode())
            for piece in self.chat.pieces
            if piece.trained
        )

    def take(self, written: Sequence[str]) -> None:
        """A turn of the assistant, texts and markers in turns from a text on, up to its end."""
        turn = parse("".join(written), self._declared)
        self.turns.append(turn)
        self.messages.append(turn.message)
        self._add(written)
        self.said = [""]
        if not turn.ended:
            self.finished = True
        elif SECTION_BEGIN in written[1::2]:
            self._tools_answer(turn)
        else:
            self._user_speaks()

    def _tools_answer(self, turn: Turn) -> None:
        self.answers = [self.world.answer(call) for call in turn.calls]
        for call, answer in zip(turn.calls, self.answers, strict=True):
            name = call.name or "unknown"
            self._say(IM_SYSTEM, name, f"## Return of {call.id}\n{answer}")
            told = {"role": "tool", "name": name, "tool_call_id": call.id, "content": answer}
            self.messages.append(told)
        self._say(IM_ASSISTANT, "assistant")

    def _user_speaks(self) -> None:
        text = next(self._users, None)
        if text is None:
            self.finished = True
            return
        self.messages.append({"role": "user", "content": text})
        self._say(IM_USER, "user", text)
        self._say(IM_ASSISTANT, "assistant")

    def _say(self, role: str, name: str, text: str | None = None) -> None:
        """A message of somebody else, or where it has no text the head of the assistant's."""
        parts = ["", role, name, IM_MIDDLE] + ([] if text is None else [text, IM_END])
        self._add(parts)
        self.said = [*self.said, *parts[1:], ""]

    def _add(self, parts: Sequence[str]) -> None:
        self.parts[-1] += parts[0]
        self.parts += parts[1:]
        if len(self.parts) % 2 == 0:
            self.parts.append("")
