# SPDX-License-Identifier: MIT
"""Declarations of tools in TypeScript, as Kimi K2.5's tokenizer writes them.

    # Tools

    ## functions
    namespace functions {
    // Weather of a city
    type get_weather = (_: {
      city: string,
      // Default: "C"
      unit?: "C" | "F"
    }) => any;
    }

Required fields come before optional ones, each sorted by name; descriptions, bounds and defaults
are comments above a field.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_ops.models.kimi_k2.chat.tool_schema import functions_of

__all__ = ["declare_typescript"]

_NAMES = {"integer": "number", "object": "{}", "array": "Array<any>"}  # others: their own
_BOUNDS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_STEP = "  "


def declare_typescript(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as a TypeScript namespace; about half the length of JSON.

    Raises
    ------
    ValueError
        A tool that is no function or has no name; a schema that the form has no words for.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.chat import declare_typescript
    >>> parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    >>> tool = {"type": "function", "function": {"name": "find", "parameters": parameters}}
    >>> print(declare_typescript([tool]).splitlines()[5])
      city?: string
    """
    functions = functions_of(tools)
    if not functions:
        return ""
    declared = "".join(f"{_Function(name, f).text()}\n" for name, f in functions.items())
    return f"# Tools\n\n## functions\nnamespace functions {{\n{declared}}}\n"


class _Function:
    def __init__(self, name: str, function: Mapping[str, Any]) -> None:
        self._name = name
        self._description = function.get("description") or ""
        self._parameters = function.get("parameters") or {}
        self._definitions: dict[str, Any] = {}
        self._refers_to_itself = False

    def text(self) -> str:
        parameters = self._object(self._parameters, "")
        lines = []
        if self._refers_to_itself:
            fields = self._fields(self._parameters, _STEP, ordered=False)
            inside = f"\n{fields}\n" if fields else ""
            lines.append(f"interface parameters {{{inside}}}")
            parameters = "parameters"
        for name, schema in tuple(self._definitions.items()):
            comment = _comment(schema.get("description"), "")
            lines.append(f"{comment}interface {name} {self._type(schema, '')}")
        comment = _comment(self._description, "")
        return "\n".join([*lines, f"{comment}type {self._name} = (_: {parameters}) => any;"])

    def _type(self, schema: Any, indent: str) -> str:
        if schema is True or schema == {}:
            return "any"
        if schema is False:
            return "null"
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join(self._type(one, indent) for one in schema["anyOf"])
        if "enum" in schema:
            return " | ".join(f'"{e}"' if isinstance(e, str) else str(e) for e in schema["enum"])
        kind = schema.get("type")
        if isinstance(kind, list):
            return " | ".join(_NAMES.get(str(one), str(one)) for one in kind)
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            return self._array(schema, indent)
        if not isinstance(kind, str):
            raise self._error(f"type, enum, anyOf or $ref in a schema, got {schema}")
        return _NAMES.get(kind, kind)

    def _object(self, schema: Mapping[str, Any], indent: str) -> str:
        self._definitions |= schema.get("$defs") or {}
        inner = indent + _STEP
        fields = [self._fields(schema, inner)] if schema.get("properties") else []
        others = schema.get("additionalProperties")
        if others is not None:
            word = "never" if others is False else self._type(others, inner)
            fields.append(f"{inner}[k: string]: {word}")
        return "{\n" + ",\n".join(fields) + f"\n{indent}}}" if fields else "{}"

    def _fields(self, schema: Mapping[str, Any], indent: str, ordered: bool = True) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        names = list(properties)
        if ordered:
            names.sort(key=lambda name: (name not in required, name))
        lines = []
        for name in names:
            field = properties[name]
            default = field.get("default") if isinstance(field, Mapping) else None
            comment = _comments(field, indent)
            if default is not None:
                number = isinstance(default, int | float)
                word = repr(default) if number else json.dumps(default, ensure_ascii=False)
                comment += f"{indent}// Default: {word}\n"
            mark = "" if name in required else "?"
            lines.append(f"{comment}{indent}{name}{mark}: {self._type(field, indent)}")
        return ",\n".join(lines)

    def _array(self, schema: Mapping[str, Any], indent: str) -> str:
        items = schema.get("items") or {}
        inner = indent + _STEP
        comment = _comments(items, inner)
        if not comment:
            return f"Array<{self._type(items, indent)}>"
        return f"Array<\n{comment}{inner}{self._type(items, inner)}\n{indent}>"

    def _reference(self, reference: str) -> str:
        if reference == "#":
            self._refers_to_itself = True
            return "parameters"
        name = reference.removeprefix("#/$defs/")
        if name not in self._definitions:
            raise self._error(f"a reference to # or into its #/$defs/, got {reference!r}")
        return name

    def _error(self, what: str) -> ValueError:
        return ValueError(
            f"declare_typescript: {self._name}: expected {what}; declare the tool as JSON"
        )


def _comment(description: str | None, indent: str) -> str:
    lines = (description or "").split("\n") if description else []
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in lines)


def _comments(schema: Any, indent: str) -> str:
    """Description and bounds, above a field or an item."""
    if not isinstance(schema, Mapping):
        return ""
    comment = _comment(schema.get("description"), indent)
    plain = not {"$ref", "anyOf", "enum"} & schema.keys() and isinstance(schema.get("type"), str)
    keys = _BOUNDS.get(schema["type"], ()) if plain else ()
    bounds = ", ".join(f"{key}: {schema[key]}" for key in keys if key in schema)
    return f"{comment}{indent}// {bounds}\n" if bounds else comment
