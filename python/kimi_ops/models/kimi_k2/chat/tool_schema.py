# SPDX-License-Identifier: MIT
"""Declarations of tools as JSON, and arguments held against a tool's JSON schema.

The keywords that are checked are those that declarations use: type, enum, const, properties,
required, additionalProperties, items, anyOf, $ref, and the bounds of numbers, texts and lists. Any
other one is refused by name, unless it only describes.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["check_arguments", "check_schema", "declare_json", "functions_of"]

Schema = Mapping[str, Any] | bool

_DESCRIBING = {
    "$comment", "$defs", "$id", "$schema", "default", "deprecated", "description", "examples",
    "format", "title",
}  # fmt: skip
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and math.isfinite(value) and value == int(value),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "minimum": ("number", lambda value, bound: value >= bound, "at least {}"),
    "maximum": ("number", lambda value, bound: value <= bound, "at most {}"),
    "exclusiveMinimum": ("number", lambda value, bound: value > bound, "more than {}"),
    "exclusiveMaximum": ("number", lambda value, bound: value < bound, "less than {}"),
    "minLength": ("string", lambda value, bound: len(value) >= bound, "at least {} characters"),
    "maxLength": ("string", lambda value, bound: len(value) <= bound, "at most {} characters"),
    "pattern": ("string", lambda value, bound: bool(re.search(bound, value)), "a match of {!r}"),
    "minItems": ("array", lambda value, bound: len(value) >= bound, "at least {} items"),
    "maxItems": ("array", lambda value, bound: len(value) <= bound, "at most {} items"),
}
_KNOWN = {
    *_DESCRIBING, *_BOUNDS, "type", "enum", "const", "properties", "required",
    "additionalProperties", "items", "anyOf", "$ref",
}  # fmt: skip


_SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_BOUNDS, ("a number", lambda value: _is_number(value))),
    "pattern": ("a regular expression", lambda value: _compiles(value)),
    **dict.fromkeys(("properties", "$defs"), ("an object", _TYPES["object"])),
    **dict.fromkeys(("required", "enum"), ("a list", _TYPES["array"])),
    "anyOf": ("a list of schemas", lambda value: isinstance(value, list) and len(value) > 0),
}


def declare_json(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as JSON without spaces, keys sorted at every depth: K2's declaration.

    Raises
    ------
    ValueError
        A tool that is no function, or has no name.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.chat import declare_json
    >>> declare_json([{"type": "function", "function": {"parameters": {}, "name": "now"}}])
    '[{"function":{"name":"now","parameters":{}},"type":"function"}]'
    """
    functions_of(tools)
    return json.dumps(list(tools), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The declared functions by name.

    Raises
    ------
    ValueError
        A tool that is no function, has no name, or the name of another one.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ValueError(
                f'tools: tools[{place}]: expected {{"type": "function", "function": {{...}}}}, got '
                f"{tool}; wrap the function in it"
            )
        name = function.get("name")
        if not isinstance(name, str) or not name or name in found:
            raise ValueError(
                f"tools: tools[{place}].function.name: expected a name of its own, got {name!r}; "
                "name each tool differently"
            )
        found[name] = function
    return found


def check_schema(schema: Schema) -> None:
    """See that a schema can be checked against.

    Raises
    ------
    ValueError
        A keyword or type that is not known, a reference that leads nowhere, a broken pattern; with
        the place in the schema.
    """
    _Schema(schema).check(schema, "schema")


def check_arguments(arguments: Any, schema: Schema) -> list[str]:
    """What is wrong with arguments under a JSON schema, a sentence each; nothing where all is well.

    Parameters
    ----------
    arguments : what ``json.loads`` gives
    schema : mapping or bool
        The `parameters` of a function.

    Raises
    ------
    ValueError
        As :func:`check_schema`.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.chat import check_arguments
    >>> schema = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
    >>> check_arguments({"city": "Bern"}, schema)
    []
    >>> check_arguments({"city": 3}, schema)
    ['arguments.city: expected string, got 3']
    """
    check_schema(schema)
    try:
        return list(_Schema(schema).complaints(arguments, schema, "arguments"))
    except RecursionError:
        return ["arguments: expected values that are nested less deeply"]


class _Schema:
    def __init__(self, root: Schema) -> None:
        self._root = root

    def check(self, schema: Any, where: str) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            raise _schema_error(where, "an object or a boolean", schema)
        for key in schema:
            if key not in _KNOWN:
                raise _schema_error(where, f"only {', '.join(sorted(_KNOWN - _DESCRIBING))}", key)
            shape, holds = _SHAPES.get(key, ("", lambda _: True))
            if not holds(schema[key]):
                raise _schema_error(f"{where}.{key}", shape, schema[key])
        for kind in kinds_of(schema):
            if kind not in _TYPES:
                raise _schema_error(f"{where}.type", " | ".join(_TYPES), kind)
        if "$ref" in schema and resolved(self._root, schema["$ref"]) is None:
            raise _schema_error(f"{where}.$ref", "a place in the same schema", schema["$ref"])
        for key in ("properties", "$defs"):
            for name, one in schema.get(key, {}).items():
                self.check(one, f"{where}.{key}.{name}")
        for key in ("items", "additionalProperties"):
            self.check(schema.get(key, True), f"{where}.{key}")
        for place, one in enumerate(schema.get("anyOf", ())):
            self.check(one, f"{where}.anyOf[{place}]")

    def complaints(self, value: Any, schema: Schema, where: str) -> Iterator[str]:
        if isinstance(schema, bool):
            if not schema:
                yield f"{where}: expected nothing here, got {_shown(value)}"
            return
        if "$ref" in schema:
            yield from self.complaints(value, resolved(self._root, schema["$ref"]) or False, where)
        yield from self._as_a_whole(value, schema, where)
        if isinstance(value, dict):
            yield from self._members(value, schema, where)
        if isinstance(value, list) and "items" in schema:
            for place, item in enumerate(value):
                yield from self.complaints(item, schema["items"], f"{where}[{place}]")

    def _as_a_whole(self, value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
        kinds = kinds_of(schema)
        if kinds and not any(_TYPES[kind](value) for kind in kinds):
            yield f"{where}: expected {' or '.join(kinds)}, got {_shown(value)}"
        allowed = [schema["const"]] if "const" in schema else schema.get("enum")
        if allowed is not None and not any(_same(value, one) for one in allowed):
            yield f"{where}: expected {' or '.join(map(_shown, allowed))}, got {_shown(value)}"
        for key, (kind, holds, words) in _BOUNDS.items():
            if key in schema and _TYPES[kind](value) and not holds(value, schema[key]):
                yield f"{where}: expected {words.format(schema[key])}, got {_shown(value)}"
        if "anyOf" in schema:
            tries = [list(self.complaints(value, one, where)) for one in schema["anyOf"]]
            if all(tries):
                yield " or ".join(reasons[0] for reasons in tries)

    def _members(
        self, value: dict[str, Any], schema: Mapping[str, Any], where: str
    ) -> Iterator[str]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{where}: expected {name}, which is missing"
        for name, member in value.items():
            if name not in properties and others is False:
                known = f"one of {', '.join(properties)}" if properties else "nothing"
                yield f"{where}: expected {known}, got {name}"
            else:
                yield from self.complaints(member, properties.get(name, others), f"{where}.{name}")


def resolved(root: Schema, reference: str) -> Schema | None:
    """What a reference like ``#/$defs/name`` leads to."""
    path, found = reference.split("/"), root
    for step in path[1:]:
        found = found.get(step) if isinstance(found, Mapping) else None  # type: ignore[assignment]
    return found if path[0] == "#" and isinstance(found, Mapping | bool) else None


def kinds_of(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names."""
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _schema_error(where: str, expected: str, came: object) -> ValueError:
    return ValueError(
        f"check_arguments: {where}: expected {expected}, got {came}; write the schema without it"
    )


def _compiles(pattern: Any) -> bool:
    try:
        return bool(re.compile(pattern))
    except (re.error, TypeError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON: 1 is 1.0 and no true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
