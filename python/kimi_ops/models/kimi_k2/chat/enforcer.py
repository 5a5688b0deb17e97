# SPDX-License-Identifier: MIT
"""A logits processor that lets a byte model call declared tools in K2's format and nothing else.

Outside of a tool section only markers that cannot stand there are closed. Inside, each byte is one
with which the template, the names of the tools and their schemas can still be fulfilled: section,
``functions.{name}:{number}`` with the next number of the dialogue, arguments, ends.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.chat.byte_tokenizer import ByteTokenizer
from kimi_ops.models.kimi_k2.chat.dialogue import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    IM_ASSISTANT,
    IM_END,
    SECTION_BEGIN,
    SECTION_END,
)
from kimi_ops.models.kimi_k2.chat.json_grammar import Choice, Grammar, Later, Places, json_grammar
from kimi_ops.models.kimi_k2.chat.json_grammar import literal as _text
from kimi_ops.models.kimi_k2.chat.tool_schema import check_schema, functions_of

__all__ = ["Enforcer"]

_IDS = ByteTokenizer().markers
_CONTENT = frozenset(range(256)) - set(_IDS.values()) | {_IDS[IM_END]}


class Enforcer:
    """For `logits_processor` of `KimiK2.generate` with a :class:`ByteTokenizer`.

    Parameters
    ----------
    tools : sequence of mappings
        The declared tools; where there are none, no section can be opened.

    Raises
    ------
    ValueError
        Declarations that are none, a schema that is not understood.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops.models.kimi_k2.chat import ByteTokenizer
    >>> from kimi_ops.models.kimi_k2.chat import Enforcer
    >>> tool = {"type": "function", "function": {"name": "now", "parameters": {"properties": {}}}}
    >>> begin = ByteTokenizer().markers["<|tool_calls_section_begin|>"]
    >>> logits = Enforcer([tool])(torch.tensor([[begin]]), torch.zeros(1, 256))
    >>> ByteTokenizer().decode(logits.isfinite().nonzero()[:, 1].tolist())
    '<|tool_call_begin|>'
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._arguments: dict[str, Grammar] = {}
        for name, function in functions_of(tools).items():
            schema = function.get("parameters") or {}
            check_schema(schema)
            fields = schema if isinstance(schema, Mapping) else {}
            self._arguments[name] = json_grammar({"properties": {}, **fields, "type": "object"})
        self._seen: Tensor | None = None  # [B, n]
        self._rows: list[_Row] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits [B, 256] behind ids [B, n], those of bytes that cannot come at minus infinity."""
        if logits.shape[-1] != ByteTokenizer.vocab_size:
            raise ValueError(
                f"Enforcer: logits: expected {ByteTokenizer.vocab_size} bytes, got "
                f"{logits.shape[-1]} tokens; it serves models of bytes"
            )
        start = 0 if self._seen is None else self._seen.shape[1]
        if self._seen is None or not torch.equal(self._seen, ids[:, :start]):
            start, self._rows = 0, [_Row(self) for _ in ids]
        self._seen = ids.clone()
        closed = torch.zeros(logits.shape, dtype=torch.bool)
        for number, (row, new) in enumerate(zip(self._rows, ids[:, start:].tolist(), strict=True)):
            for one in new:
                row.take(one)
            allowed = row.allowed()
            if not allowed:
                raise ValueError(
                    f"Enforcer: ids: expected declared calls in the section that is open, got "
                    f"others in row {number}; end the turn or open another section"
                )
            closed[number] = True
            closed[number, list(allowed)] = False
        return logits.masked_fill(closed.to(logits.device), -torch.inf)

    def section(self, number: int) -> Grammar:
        """Calls from this number on, the end of the section and of the turn."""
        names = Choice(
            tuple(
                (_text(f"functions.{name}:{number}"), _marker(ARGUMENT_BEGIN), arguments)
                for name, arguments in self._arguments.items()
            )
        )
        last = (_marker(SECTION_END), _marker(IM_END))
        another = Choice((last, Later(lambda: self.section(number + 1))))
        return (_marker(CALL_BEGIN), names, _marker(CALL_END), another)

    @property
    def content(self) -> frozenset[int]:
        """What may come outside of a section."""
        return _CONTENT | {_IDS[SECTION_BEGIN]} if self._arguments else _CONTENT


def _marker(spelling: str) -> frozenset[int]:
    return frozenset((_IDS[spelling],))


class _Row:
    """Where one sequence stands."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._calls = 0
        self._places: Places | None = None  # in a section

    def take(self, one: int) -> None:
        if one == _IDS[SECTION_BEGIN]:
            self._places = Places.at_start(self._enforcer.section(self._calls))
        elif one in (_IDS[IM_END], _IDS[IM_ASSISTANT]):
            self._places = None
        elif self._places is not None:
            self._places = self._places.behind(one)
        self._calls += one == _IDS[CALL_BEGIN]

    def allowed(self) -> frozenset[int]:
        """What may come next."""
        return self._enforcer.content if self._places is None else self._places.allowed
