# SPDX-License-Identifier: MIT
"""Tools: what they are called and take, what they mean, and how new ones come from old ones.

    category -> domain -> table of a kind of thing, with columns -> tools on it -> evolved tools

A tool's meaning is data (`Semantics`): one executor, `kimi_ops.agentic.world`, runs every tool, so
no evolution makes one without a meaning.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_ops.agentic.words import word, words

__all__ = [
    "DOMAINS",
    "HELD_OUT_DOMAINS",
    "HELD_OUT_OPERATOR",
    "LOOK_UP",
    "OPERATORS",
    "TICKET",
    "Domain",
    "Semantics",
    "Tool",
    "base_tools",
    "is_held_out",
    "repository",
    "usage",
]


@dataclass(frozen=True)
class Domain:
    """A table: rows of one kind of thing, with a few columns."""

    category: str
    table: str
    thing: str
    columns: tuple[str, ...]


def _domains() -> Iterator[Domain]:
    for category, tables in {
        "shop": "orders:order:status,price,owner stock:item:shelf,price parcels:parcel:state,box "
        "cards:card:holder,limit",
        "travel": "trains:train:track,driver hotels:guest:room,floor flights:flight:gate,pilot "
        "cars:car:renter,town",
        "office": "staff:person:desk,team,boss rooms:room:host,floor mail:letter:sender,tray "
        "projects:project:lead,stage",
        "home": "lamps:lamp:level,color plants:plant:pot,day music:song:singer,album "
        "food:dish:cook,jar",
        "lab": "samples:sample:rack,grade probes:probe:angle,unit mice:mouse:cage,diet "
        "fluids:flask:acid,color",
        "games": "players:player:score,clan maps:map:zone,theme decks:deck:rank,suit "
        "pets:pet:keeper,mood",
    }.items():
        for entry in tables.split():
            table, thing, columns = entry.split(":")
            yield Domain(category, table, thing, tuple(columns.split(",")))


DOMAINS = tuple(_domains())
HELD_OUT_DOMAINS = ("cars", "pets")
LOOK_UP = "after a look-up"  # what the declaration of a tool with a precondition says
TICKET = "ticket"  # a column that every table has
_VERBS = {
    "get": ("get", "show", "read", "check", "fetch", "view"),
    "set": ("set", "change", "update", "write", "edit"),
    "find": ("find", "search", "locate"),
    "add": ("add", "create", "register"),
    "cancel": ("cancel", "delete", "drop", "remove"),
    "move": ("move", "send", "shift"),
    "count": ("count", "tally"),
    "sum": ("sum", "total"),
}


@dataclass(frozen=True)
class Semantics:
    """What a tool does to a table.

    Attributes
    ----------
    op : str
        get, set, use (set where a value came, get where none did), find, add, cancel, move, count,
        sum.
    table : str
    key : str
        The parameter that names the row; empty where none does.
    column : str
        That is read, written, compared or summed up; empty where none is.
    value : str
        The parameter that brings a value; empty where none does.
    fallback : str
        An optional parameter: what to answer where there is no such row.
    looked_up : bool
        Whether the row must have been read before it may be changed.
    by : str
        The column in which `key` is looked for; empty: it is the name of the row.
    """

    op: str
    table: str
    key: str = ""
    column: str = ""
    value: str = ""
    fallback: str = ""
    looked_up: bool = False
    by: str = ""


@dataclass(frozen=True)
class Tool:
    """A declaration and its meaning.

    Attributes
    ----------
    name : str
    parameters : dict
        JSON schema of the arguments.
    semantics : Semantics
    domain : Domain
        With the names that the tool's user has for thing and columns.
    lineage : tuple of str
        The operators that made it from a base tool.
    note : str
        What the declaration says of when to call it.
    """

    name: str
    parameters: Mapping[str, Any]
    semantics: Semantics
    domain: Domain
    lineage: tuple[str, ...] = ()
    note: str = ""

    @property
    def declaration(self) -> dict[str, Any]:
        """As OpenAI's interface has it."""
        function = {
            "name": self.name, "description": self.about, "parameters": dict(self.parameters),
        }  # fmt: skip
        return {"type": "function", "function": function}

    @property
    def about(self) -> str:
        """Its usage."""
        return usage(self.name, self.parameters["required"], self.note)

    @property
    def shape(self) -> str:
        """What two tools share that differ in nothing a caller sees."""
        return json.dumps(self.declaration, sort_keys=True)

    @property
    def choices(self) -> Sequence[str]:
        """What its value may be; nothing: any word."""
        return self.parameters["properties"].get(self.semantics.value, {}).get("enum", ())

    @property
    def changes(self) -> bool:
        return self.semantics.op in ("set", "use", "add", "cancel", "move")


def usage(name: str, fields: Iterable[str], note: str = "") -> str:
    """What a tool is about, its name without the verb, and its fields in the order of a call, which
    is not that of the declaration. A declaration describes a tool so, and the assistant says it
    before a call: fields stand close behind the word that they are found by.

    Examples
    --------
    >>> from kimi_ops.agentic.specs import LOOK_UP, usage
    >>> usage("status_set", ("order", "status"))
    'status: order, status'
    >>> usage("status_set", ("order", "status"), LOOK_UP)
    'status after a look-up: order, status'
    """
    about = " ".join(filter(None, (name.rpartition("_")[0], note)))
    return ": ".join(filter(None, (about, ", ".join(fields))))


def _schema(*fields: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {field: {"type": "string"} for field in (*fields, *optional)},
        "required": list(fields),
    }


def base_tools(domain: Domain) -> list[Tool]:
    """Those that a domain begins with."""
    thing, table = domain.thing, domain.table
    tools = [
        Tool(f"{thing}_add", _schema(thing), Semantics("add", table, thing), domain),
        Tool(f"{thing}_cancel", _schema(thing), Semantics("cancel", table, thing), domain),
    ]
    for column in domain.columns:
        by = Semantics("get", table, key=thing, column=column)
        both = dataclasses.replace(by, value=column)
        of = Semantics("find", table, column=column, value=column)
        tools += [
            Tool(f"{column}_get", _schema(thing), by, domain),
            Tool(f"{column}_set", _schema(thing, column), _op(both, "set"), domain),
            Tool(f"{thing}_move", _schema(thing, column), _op(both, "move"), domain),
            Tool(f"{column}_find", _schema(column), of, domain),
            Tool(f"{table}_count", _schema(column), _op(of, "count"), domain),
            Tool(f"{column}_sum", _schema(), Semantics("sum", table, column=column), domain),
        ]
    return tools


def _op(semantics: Semantics, op: str) -> Semantics:
    return dataclasses.replace(semantics, op=op)


# Evolution: an operator makes one or two tools of one, none where it has nothing to work on.


def _rename_verb(tool: Tool, rng: random.Random) -> Sequence[Tool]:
    rest, _, old = tool.name.rpartition("_")
    verbs = [verb for verb in _VERBS.get(tool.semantics.op, ()) if verb != old]
    return [dataclasses.replace(tool, name=f"{rest}_{rng.choice(verbs)}")] if verbs else []


def _rename_field(tool: Tool, rng: random.Random) -> Sequence[Tool]:
    """Column, or where there is none thing, gets a word that nobody has heard: in the name of the
    tool, in its fields and in what its user says."""
    old, new = tool.semantics.column or tool.domain.thing, word(rng, fresh=False)
    if new in (tool.domain.thing, *tool.domain.columns, TICKET):
        return []

    def renamed(name: str) -> str:
        return new if name == old else name

    domain = dataclasses.replace(
        tool.domain,
        thing=renamed(tool.domain.thing),
        columns=tuple(map(renamed, tool.domain.columns)),
    )
    meaning = tool.semantics
    semantics = dataclasses.replace(
        meaning, key=renamed(meaning.key), column=renamed(meaning.column),
        value=renamed(meaning.value), by=renamed(meaning.by),
    )  # fmt: skip
    properties = {renamed(field): kind for field, kind in tool.parameters["properties"].items()}
    parameters = {
        **tool.parameters,
        "properties": properties,
        "required": list(map(renamed, tool.parameters["required"])),
    }
    rest, _, verb = tool.name.rpartition("_")
    name = f"{renamed(rest)}_{verb}"
    return [Tool(name, parameters, semantics, domain, tool.lineage, tool.note)]


def _optional(tool: Tool, rng: random.Random) -> Sequence[Tool]:
    """What to answer where the row is not there."""
    if tool.semantics.op != "get" or tool.semantics.fallback:
        return []
    field = rng.choice(("default", "else", "fallback"))
    properties = {**tool.parameters["properties"], field: {"type": "string"}}
    semantics = dataclasses.replace(tool.semantics, fallback=field)
    parameters = {**tool.parameters, "properties": properties}
    return [dataclasses.replace(tool, parameters=parameters, semantics=semantics)]


def _enumerate(tool: Tool, rng: random.Random) -> Sequence[Tool]:
    """The value is one of three words."""
    field, properties = tool.semantics.value, tool.parameters["properties"]
    if tool.semantics.op not in ("set", "move") or "enum" in properties[field]:
        return []
    changed = {**properties, field: {"enum": words(rng, 3, fresh=False)}}
    return [dataclasses.replace(tool, parameters={**tool.parameters, "properties": changed})]


def _precondition(tool: Tool, rng: random.Random) -> Sequence[Tool]:
    """The row must have been looked up before it is changed."""
    if tool.semantics.op not in ("set", "move", "cancel") or tool.semantics.looked_up:
        return []
    semantics = dataclasses.replace(tool.semantics, looked_up=True)
    return [dataclasses.replace(tool, semantics=semantics, note=LOOK_UP)]


def _split(tool: Tool, rng: random.Random) -> Sequence[Tool]:
    """One look-up becomes two: the first finds the ticket of a thing, the second takes tickets."""
    meaning, thing = tool.semantics, tool.domain.thing
    if meaning.op != "get" or meaning.by or meaning.fallback:
        return []
    first = Semantics("get", meaning.table, key=thing, column=TICKET)
    second = dataclasses.replace(meaning, key=TICKET, by=TICKET)
    return [
        dataclasses.replace(
            tool, name=f"{TICKET}_find", parameters=_schema(thing), semantics=first
        ),
        dataclasses.replace(tool, parameters=_schema(TICKET), semantics=second),
    ]


def _merge(tool: Tool, rng: random.Random) -> Sequence[Tool]:
    """Reading and writing in one tool: without a value it answers the present one."""
    meaning = tool.semantics
    if meaning.op != "set" or meaning.looked_up:
        return []
    parameters = {**tool.parameters, "required": [meaning.key]}
    name = f"{tool.name.rpartition('_')[0]}_use"
    return [
        dataclasses.replace(tool, name=name, parameters=parameters, semantics=_op(meaning, "use"))
    ]


Operator = Callable[[Tool, random.Random], Sequence[Tool]]
OPERATORS: Mapping[str, Operator] = {
    "rename verb": _rename_verb,
    "rename field": _rename_field,
    "optional": _optional,
    "enum": _enumerate,
    "precondition": _precondition,
    "split": _split,
    "merge": _merge,
}
HELD_OUT_OPERATOR = "merge"


def is_held_out(tool: Tool) -> bool:
    """Whether training never sees it: of a held-out domain, or by the held-out operator."""
    return tool.semantics.table in HELD_OUT_DOMAINS or HELD_OUT_OPERATOR in tool.lineage


def repository(count: int = 2000, seed: int = 0) -> list[Tool]:
    """Base tools and what evolution makes of them, no two alike for a caller.

    Parameters
    ----------
    count : int
        At least so many.
    seed : int

    Examples
    --------
    >>> from kimi_ops.agentic.specs import repository
    >>> tools = repository(500)
    >>> len(tools) >= 500, len({tool.shape for tool in tools}) == len(tools)
    (True, True)
    """
    rng = random.Random(f"repository {seed}")
    base = [tool for domain in DOMAINS for tool in base_tools(domain)]
    tools = list({tool.shape: tool for tool in base}.values())
    seen = {tool.shape for tool in tools}
    while len(tools) < count:
        parent, name = rng.choice(tools), rng.choice(tuple(OPERATORS))
        if len(parent.lineage) >= 3:
            continue
        for made in OPERATORS[name](parent, rng):
            if made.shape not in seen:
                seen.add(made.shape)
                tools.append(dataclasses.replace(made, lineage=(*parent.lineage, name)))
    return tools
