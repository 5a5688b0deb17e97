# SPDX-License-Identifier: MIT
"""The simulator of all tools: tables that calls read and change, faults, the digest of the end."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_ops.agentic.specs import Semantics, Tool
from kimi_ops.models.kimi_k2.chat import ToolCall

__all__ = ["BUSY", "DONE", "NOT_FOUND", "Table", "World"]

Table = dict[str, dict[str, str]]  # row -> column -> value
BUSY, DONE, NOT_FOUND = "busy, try again", "done", "not found"


@dataclass
class World:
    """State that outlives a call.

    Attributes
    ----------
    tools : sequence of Tool
        Those that are declared.
    tables : dict
        By name.
    busy : int
        How many of the next calls are answered with `BUSY`, whatever they ask.
    read : set
        Rows that were looked up, as (table, row).
    """

    tools: Sequence[Tool]
    tables: dict[str, Table]
    busy: int = 0
    read: set[tuple[str, str]] = field(default_factory=set)

    def copy(self) -> World:
        return World(self.tools, copy.deepcopy(self.tables), self.busy, set(self.read))

    def digest(self) -> str:
        """SHA-256 of the tables: equal for equal ends, on whatever way."""
        return hashlib.sha256(json.dumps(self.tables, sort_keys=True).encode()).hexdigest()

    def answer(self, call: ToolCall) -> str:
        """Carry out a call that a model wrote; what is wrong with it is the answer."""
        if call.malformed is not None:
            return f"error: {call.malformed}"
        if call.complaints:
            return f"error: {'; '.join(call.complaints)}"
        assert call.arguments is not None
        return self.call(call.name, call.arguments)

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Carry out a call whose arguments keep to the declaration."""
        if self.busy:
            self.busy -= 1
            return BUSY
        tool = next(tool for tool in self.tools if tool.name == name)
        meaning, table = tool.semantics, self.tables[tool.semantics.table]
        if meaning.op in ("find", "count"):
            found = [
                n for n, row in table.items() if row[meaning.column] == arguments[meaning.value]
            ]
            if meaning.op == "count":
                return str(len(found))
            return found[0] if found else NOT_FOUND
        if meaning.op == "sum":
            return str(sum(int(row[meaning.column]) for row in table.values()))
        return self._on_row(meaning, table, arguments)

    def _on_row(self, meaning: Semantics, table: Table, arguments: Mapping[str, Any]) -> str:
        name = arguments[meaning.key]
        if meaning.by:
            name = next((n for n, row in table.items() if row[meaning.by] == name), None)
        if meaning.op == "add":
            if name in table:
                return "already there"
            columns = {column for row in table.values() for column in row}
            table[name] = dict.fromkeys(sorted(columns), "")
            return DONE
        if name not in table:
            return arguments.get(meaning.fallback, NOT_FOUND) if meaning.fallback else NOT_FOUND
        value = arguments.get(meaning.value) if meaning.value else None
        if meaning.op == "get" or meaning.op == "use" and value is None:
            self.read.add((meaning.table, name))
            return table[name][meaning.column]
        if meaning.looked_up and (meaning.table, name) not in self.read:
            return "error: look it up first"
        if meaning.op == "cancel":
            del table[name]
        elif meaning.op == "move" and table[name][meaning.column] == value:
            return "already there"
        else:
            assert value is not None
            table[name][meaning.column] = value
        return DONE
