# SPDX-License-Identifier: MIT
"""Declarations of tools as JSON and TypeScript; arguments against a schema."""

import json

import pytest

from kimi_ops.models.kimi_k2.chat import check_arguments, declare_json, declare_typescript


def tool(name, parameters=None, **more):
    function = {"name": name, "parameters": parameters or {}, **more}
    return {"type": "function", "function": function}


def fields(properties, **more):
    return {"type": "object", "properties": properties, **more}


def test_json_is_sorted_compact_and_unescaped():
    declared = declare_json([tool("b", fields({"ü": {"type": "string"}, "a": {}}))])
    assert declared == (
        '[{"function":{"name":"b","parameters":{"properties":{"a":{},"ü":{"type":"string"}},'
        '"type":"object"}},"type":"function"}]'
    )
    assert json.loads(declared)[0]["function"]["name"] == "b"


TYPESCRIPT = """\
# Tools

## functions
namespace functions {
// Weather of a city

// in two paragraphs
type get_weather = (_: {
  // Where
  city: string,
  when: {
    // maximum: 14, minimum: 0
    day: number
  },
  // Default: "C"
  unit?: "C" | "F",
  // maxItems: 3, minItems: 1
  zones?: Array<
    // minLength: 2
    string
  >,
  [k: string]: never
}) => any;
type now = (_: {}) => any;
interface point {
  x: number,
  y?: number | null
}
type draw = (_: {
  // Default: True
  closed?: boolean,
  more?: any,
  path?: Array<point>,
  raw?: Array<any> | {} | number,
  sub?: null | {
    [k: string]: string
  }
}) => any;
interface parameters {
  name?: string,
  child?: parameters
}
type tree = (_: parameters) => any;
}
"""


def test_typescript():
    weather = fields(
        {
            "unit": {"enum": ["C", "F"], "default": "C"},
            "zones": {
                "type": "array",
                "items": {"type": "string", "minLength": 2},
                "minItems": 1,
                "maxItems": 3,
            },
            "when": fields(
                {"day": {"type": "integer", "minimum": 0, "maximum": 14}}, required=["day"]
            ),
            "city": {"type": "string", "description": "Where"},
        },
        required=["when", "city"],
        additionalProperties=False,
    )
    point = fields({"y": {"type": ["number", "null"]}, "x": {"type": "number"}}, required=["x"])
    draw = fields(
        {
            "path": {"type": "array", "items": {"$ref": "#/$defs/point"}},
            "closed": {"type": "boolean", "default": True},
            "more": {},
            "raw": {"type": ["array", "object", "integer"]},
            "sub": {
                "anyOf": [
                    {"type": "null"},
                    {"type": "object", "additionalProperties": {"type": "string"}},
                ]
            },
        },
        **{"$defs": {"point": point}},
    )
    tools = [
        tool("get_weather", weather, description="Weather of a city\n\nin two paragraphs"),
        tool("now"),
        tool("draw", draw),
        tool("tree", fields({"name": {"type": "string"}, "child": {"$ref": "#"}})),
    ]
    assert declare_typescript(tools) == TYPESCRIPT
    assert declare_typescript([]) == ""


@pytest.mark.parametrize("declare", [declare_json, declare_typescript])
@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"name": "a"}], r"tools\[0\]: expected"),
        (["a"], r"tools\[0\]: expected"),
        ([{"type": "plugin", "function": {"name": "a"}}], r"tools\[0\]: expected"),
        ([tool("")], "a name of its own, got ''"),
        ([tool("a"), tool("a")], r"tools\[1\].function.name: .* got 'a'"),
    ],
)
def test_what_is_no_declaration_is_refused(declare, tools, message):
    with pytest.raises(ValueError, match=message):
        declare(tools)


@pytest.mark.parametrize("schema", [{"$ref": "#/$defs/none"}, {"oneOf": []}])
def test_typescript_without_words_for_a_schema_is_refused(schema):
    with pytest.raises(ValueError, match="declare_typescript: f: expected"):
        declare_typescript([tool("f", fields({"a": schema}))])


NESTED = fields({"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": "#"}}})
CASES = [
    (True, {"any": 1}, None),
    (False, {}, "arguments: expected nothing here, got {}"),
    ({}, 3, None),
    ({"type": "string"}, "a", None),
    ({"type": "string"}, 3, "arguments: expected string, got 3"),
    ({"type": "integer"}, 3.0, None),
    ({"type": "integer"}, 3.5, "arguments: expected integer, got 3.5"),
    ({"type": "integer"}, True, "arguments: expected integer, got true"),
    ({"type": "number"}, False, "arguments: expected number, got false"),
    ({"type": "boolean"}, 0, "arguments: expected boolean, got 0"),
    ({"type": ["string", "null"]}, None, None),
    ({"type": ["string", "null"]}, 3, "arguments: expected string or null, got 3"),
    ({"type": "object"}, [], "arguments: expected object, got []"),
    ({"enum": ["a", 1]}, 1.0, None),
    ({"enum": ["a", 1]}, True, 'arguments: expected "a" or 1, got true'),
    ({"enum": [{"a": [1]}]}, {"a": [1.0]}, None),
    ({"enum": [{"a": [1]}]}, {"a": [True]}, 'arguments: expected {"a": [1]}, got {"a": [true]}'),
    ({"const": None}, 0, "arguments: expected null, got 0"),
    ({"minimum": 2}, 2, None),
    ({"minimum": 2}, 1, "arguments: expected at least 2, got 1"),
    ({"maximum": 2}, 3, "arguments: expected at most 2, got 3"),
    ({"maximum": 2}, "text", None),  # a bound of numbers
    ({"exclusiveMinimum": 2}, 2, "arguments: expected more than 2, got 2"),
    ({"exclusiveMaximum": 2}, 2, "arguments: expected less than 2, got 2"),
    ({"minLength": 2}, "ü", 'arguments: expected at least 2 characters, got "ü"'),
    ({"maxLength": 2}, "abc", 'arguments: expected at most 2 characters, got "abc"'),
    ({"pattern": "^a+$"}, "ab", "arguments: expected a match of '^a+$', got \"ab\""),
    ({"pattern": "a"}, "bab", None),
    ({"minItems": 1}, [], "arguments: expected at least 1 items, got []"),
    ({"maxItems": 1}, [1, 2], "arguments: expected at most 1 items, got [1, 2]"),
    ({"items": {"type": "null"}}, [None, 1], "arguments[1]: expected null, got 1"),
    (fields({"a": {}}, required=["a", "b"]), {"a": 1}, "arguments: expected b, which is missing"),
    (fields({"a": fields({"b": {"type": "null"}})}), {"a": {"b": 1}}, "arguments.a.b: expected"),
    (fields({"a": {}}), {"z": 1}, None),
    (fields({"a": {}}, additionalProperties=False), {"z": 1}, "expected one of a, got z"),
    (fields({}, additionalProperties=False), {"z": 1}, "arguments: expected nothing, got z"),
    ({"additionalProperties": {"type": "null"}}, {"z": 1}, "arguments.z: expected null, got 1"),
    ({"anyOf": [{"type": "null"}, {"minimum": 3}]}, 3, None),
    (
        {"anyOf": [{"type": "null"}, {"minimum": 3}]},
        2,
        "arguments: expected null, got 2 or arguments: expected at least 3, got 2",
    ),
    (NESTED, {"parts": [{"parts": [{"name": "a"}]}]}, None),
    (NESTED, {"parts": [{"parts": [{"name": 1}]}]}, "arguments.parts[0].parts[0].name: expected"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, 1, "arguments: expected null"),
    ({"$ref": "#/$defs/a", "$defs": {"a": False}}, 1, "arguments: expected nothing here"),
    ({"description": "d", "title": "t", "format": "date", "default": 1}, "x", None),
    ({"type": "string"}, "x" * 99, None),
    ({"type": "null"}, "x" * 99, "x..."),
]


@pytest.mark.parametrize(("schema", "value", "expected"), CASES)
def test_arguments_against_a_schema(schema, value, expected):
    found = check_arguments(value, schema)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_every_complaint_is_told():
    schema = fields({"a": {"type": "string"}, "b": {"minimum": 1}}, required=["c"])
    assert len(check_arguments({"a": 1, "b": 0}, schema)) == 3


def test_values_nested_deeper_than_the_stack_are_a_complaint():
    deep = {}
    for _ in range(5000):
        deep = {"parts": [deep]}
    assert check_arguments(deep, NESTED) == [
        "arguments: expected values that are nested less deeply"
    ]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"oneOf": []}, "schema: expected only .*anyOf.*, got oneOf"),
        (fields({"a": {"not": {}}}), "schema.properties.a: expected only .* got not"),
        ({"items": {"type": "text"}}, "schema.items.type: expected null | .* got text"),
        ({"anyOf": [{"type": ["null", "x"]}]}, r"schema.anyOf\[0\].type: .* got x"),
        ({"additionalProperties": 3}, "schema.additionalProperties: expected an object"),
        ({"$ref": "#/$defs/a"}, r"schema.\$ref: expected a place in the same schema"),
        ({"properties": ["a"]}, "schema.properties: expected an object"),
        ({"required": "a"}, "schema.required: expected a list"),
        ({"anyOf": []}, "schema.anyOf: expected a list of schemas"),
        ({"minimum": "3"}, "schema.minimum: expected a number, got 3"),
        ({"$ref": "other.json"}, r"schema.\$ref"),
        ({"$defs": {"a": {"pattern": "("}}}, r"schema.\$defs.a.pattern: expected a regular"),
    ],
)
def test_a_schema_that_is_not_understood_is_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        check_arguments({}, schema)
