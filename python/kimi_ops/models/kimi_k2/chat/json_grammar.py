# SPDX-License-Identifier: MIT
"""Which bytes may come next in JSON that fits a schema.

A grammar is made of sets of ids, tuples of grammars one behind the other, `Choice`s and `Later`s,
which are made when they are reached and so may lead back to themselves. A place in it is a stack
of what is still to come; as long as the text leaves several ways open there are several places.
JSON is written as Python writes it, with ``, `` and ``: ``, and fields in the declared order.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_ops.models.kimi_k2.chat.tool_schema import Schema, kinds_of, resolved

__all__ = ["Choice", "Grammar", "Later", "Places", "json_grammar", "literal"]


@dataclass(frozen=True, eq=False)
class Choice:
    options: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Later:
    make: Callable[[], Any]


Grammar = frozenset[int] | tuple[Any, ...] | Choice | Later
_Stack = tuple[Any, Any] | None  # a grammar and the stack below; None is the end


class Places:
    """Where a text may stand in a grammar; immutable."""

    def __init__(self, stacks: Iterable[_Stack]) -> None:
        """Every stack with a set of ids on top, or None: the end."""
        self._stacks = list(_opened(stacks))

    @classmethod
    def at_start(cls, grammar: Grammar) -> "Places":
        return cls([(grammar, None)])

    @property
    def allowed(self) -> frozenset[int]:
        """The ids that may come next."""
        return frozenset().union(*(stack[0] for stack in self._stacks if stack is not None))

    @property
    def at_end(self) -> bool:
        """Whether the text is whole."""
        return any(stack is None for stack in self._stacks)

    def behind(self, one: int) -> "Places":
        """The places behind one more id; none where it is not allowed."""
        return Places(stack[1] for stack in self._stacks if stack is not None and one in stack[0])


def _opened(stacks: Iterable[_Stack]) -> Iterator[_Stack]:
    """The stacks as far as the next id; one that is reached by several ways is followed once."""
    waiting, met = list(stacks), dict[int, _Stack]()
    while waiting:
        stack = waiting.pop()
        if id(stack) in met:
            continue
        met[id(stack)] = stack
        if stack is None or isinstance(stack[0], frozenset):
            yield stack
            continue
        top, below = stack
        if isinstance(top, Choice):
            waiting += [(option, below) for option in top.options]
        elif isinstance(top, Later):
            waiting.append((top.make(), below))
        else:
            for part in reversed(top):
                below = (part, below)
            waiting.append(below)


def literal(text: str) -> Grammar:
    return tuple(frozenset((one,)) for one in text.encode())


def _bytes(*ranges: tuple[int, int]) -> frozenset[int]:
    return frozenset(one for first, last in ranges for one in range(first, last + 1))


def _repeated(part: Grammar, least: int = 0, most: int | None = None) -> Grammar:
    if least:
        rest = Later(lambda: _repeated(part, least - 1, None if most is None else most - 1))
        return (part, rest)
    if most is not None and most <= 0:
        return ()
    fewer = None if most is None else most - 1
    return Choice(((), (part, Later(lambda: _repeated(part, 0, fewer)))))


_QUOTE, _TAIL = literal('"'), _bytes((0x80, 0xBF))
_CHARACTER = Choice(
    (
        _bytes((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F)),
        (literal("\\"), frozenset(b'"\\/bfnrt')),
        (_bytes((0xC2, 0xDF)), _TAIL),
        (frozenset((0xE0,)), _bytes((0xA0, 0xBF)), _TAIL),
        (_bytes((0xE1, 0xEC), (0xEE, 0xEF)), _TAIL, _TAIL),
        (frozenset((0xED,)), _bytes((0x80, 0x9F)), _TAIL),  # no surrogates
        (frozenset((0xF0,)), _bytes((0x90, 0xBF)), _TAIL, _TAIL),
        (_bytes((0xF1, 0xF3)), _TAIL, _TAIL, _TAIL),
        (frozenset((0xF4,)), _bytes((0x80, 0x8F)), _TAIL, _TAIL),
    )
)
_DIGIT = _bytes((0x30, 0x39))
_INTEGER = (
    Choice(((), literal("-"))),
    Choice((literal("0"), (_bytes((0x31, 0x39)), _repeated(_DIGIT)))),
)
_NUMBER = (_INTEGER, Choice(((), (literal("."), _repeated(_DIGIT, 1)))))
_NAMES = ("null", "boolean", "string", "number", "array", "object")


def json_grammar(schema: Schema) -> Grammar:
    """JSON that fits a schema, but for bounds of numbers, patterns, and what stands beside anyOf,
    enum, const or $ref, which are left to `check_arguments`."""
    return _Writer(schema).value(schema)


class _Writer:
    def __init__(self, root: Schema) -> None:
        self._root = root

    def value(self, schema: Schema) -> Grammar:
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        if "$ref" in schema:
            target = resolved(self._root, schema["$ref"])
            return Later(lambda: self.value(False if target is None else target))
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return Choice(tuple(literal(json.dumps(v, ensure_ascii=False)) for v in values))
        if "anyOf" in schema:
            return Choice(tuple(self.value(one) for one in schema["anyOf"]))
        kinds = kinds_of(schema) or (["object"] if "properties" in schema else _NAMES)
        return Choice(tuple(self._of_kind(kind, schema) for kind in kinds))

    def _of_kind(self, kind: str, schema: Mapping[str, Any]) -> Grammar:
        if kind == "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength")
            return (_QUOTE, _repeated(_CHARACTER, least, most), _QUOTE)
        if kind == "array":
            return Later(lambda: self._list(schema))
        if kind == "object":
            return Later(lambda: self._object(schema))
        plain = {"null": literal("null"), "integer": _INTEGER, "number": _NUMBER}
        return plain.get(kind) or Choice((literal("true"), literal("false")))

    def _list(self, schema: Mapping[str, Any]) -> Grammar:
        item = self.value(schema.get("items", True))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        return (literal("["), _listed(item, least, most), literal("]"))

    def _object(self, schema: Mapping[str, Any]) -> Grammar:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        required = schema.get("required", [])
        known = {name: one for name, one in properties.items() if one is not False}
        known |= {name: others for name in required if name not in properties}
        if known or "properties" in schema or others is False:
            fields = [(name, one, name in required) for name, one in known.items()]
            return (literal("{"), self._fields(fields, True), literal("}"))
        name = (_QUOTE, _repeated(_CHARACTER), _QUOTE)
        return (literal("{"), _listed((name, literal(": "), self.value(others))), literal("}"))

    def _fields(self, fields: list[tuple[str, Schema, bool]], first: bool) -> Grammar:
        """What may stand between braces: fields in order, those that are not required or not."""
        if not fields:
            return ()
        (name, schema, required), *rest = fields
        key = literal(("" if first else ", ") + json.dumps(name, ensure_ascii=False) + ": ")
        taken = (key, self.value(schema), Later(lambda: self._fields(rest, False)))
        return taken if required else Choice((taken, Later(lambda: self._fields(rest, first))))


def _listed(item: Grammar, least: int = 0, most: int | None = None) -> Grammar:
    if most == 0:
        return ()
    more = _repeated((literal(", "), item), max(0, least - 1), None if most is None else most - 1)
    return (item, more) if least else Choice(((), (item, more)))
