# SPDX-License-Identifier: MIT
"""What users say: the same wish in the words of several personas."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from kimi_ops.agentic.specs import Tool

__all__ = ["PERSONAS", "Wish", "spoken", "together"]


@dataclass(frozen=True)
class Wish:
    """What a user wants of one tool.

    Attributes
    ----------
    tool : Tool
    row : str
        The thing that is meant, by name or by ticket.
    value : str
        New, or looked for; empty where the wish has none, or the user leaves it out.
    """

    tool: Tool
    row: str = ""
    value: str = ""


# Of each persona one way to say it, by the tool's op. {column}, {thing}, {table} are the words of
# the tool's user; {row} and {value} those of the wish.
PERSONAS = {
    "terse": {
        "get": "{column} of {row}?",
        "set": "set {column} of {row} to {value}",
        "find": "{thing} with {column} {value}?",
        "add": "add {thing} {row}",
        "cancel": "cancel {thing} {row}",
        "move": "move {thing} {row} to {column} {value}",
        "count": "how many {table} with {column} {value}?",
        "sum": "sum of {column}?",
    },
    "polite": {
        "get": "please tell me the {column} of {row}",
        "set": "please set the {column} of {row} to {value}",
        "find": "please find the {thing} whose {column} is {value}",
        "add": "please add the {thing} {row}",
        "cancel": "please cancel the {thing} {row}",
        "move": "please move the {thing} {row} to {column} {value}",
        "count": "please count the {table} whose {column} is {value}",
        "sum": "please sum up the {column}",
    },
    "hasty": {
        "get": "{row} - its {column}, quick",
        "set": "{row} - {column} must be {value} now",
        "find": "{column} {value} - which {thing}?",
        "add": "{row} - new {thing}, quick",
        "cancel": "{row} - {thing} must go, cancel",
        "move": "{row} - {thing} goes to {column} {value}",
        "count": "{table}, {column} {value} - how many?",
        "sum": "all {column} - what sum?",
    },
}
_MISSING = {"set": " to {value}", "move": " {value}"}  # what is left out where the value is


def spoken(wish: Wish, rng: random.Random, *, persona: str | None = None) -> str:
    """The wish in a persona's words; one of them by chance where none is named.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.specs import DOMAINS, base_tools
    >>> from kimi_ops.agentic.users import Wish, spoken
    >>> tool = base_tools(DOMAINS[0])[2]
    >>> spoken(Wish(tool, "acorn"), random.Random(0), persona="terse")
    'status of acorn?'
    """
    meaning, domain = wish.tool.semantics, wish.tool.domain
    said = PERSONAS[persona or rng.choice(tuple(PERSONAS))]
    op = meaning.op if meaning.op != "use" else ("set" if wish.value else "get")
    pattern = said[op]
    if not wish.value and op in _MISSING:
        pattern = PERSONAS["terse"][op].removesuffix(_MISSING[op])
    return pattern.format(
        column=meaning.column, thing=domain.thing, table=meaning.table,
        row=wish.row, value=wish.value,
    )  # fmt: skip


def together(wishes: Iterable[Wish], rng: random.Random) -> str:
    """Several wishes in one sentence."""
    return " and ".join(spoken(wish, rng, persona="terse").rstrip("?") for wish in wishes)
