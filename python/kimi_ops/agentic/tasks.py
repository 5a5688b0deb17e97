# SPDX-License-Identifier: MIT
"""Tasks: what a user wants of which tools, in which world, and how one knows that it was done.

lookup     one call that reads              fault      the tool is busy, or there is no such row
write      one call that changes            ask        the user left a value out
chain      what one call finds, the next    pair       two calls that do not need one another
           one takes                        tell       look something up and tell it, in words
none       no tool fits
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kimi_ops.agentic.specs import TICKET, Tool
from kimi_ops.agentic.users import Wish, spoken, together
from kimi_ops.agentic.words import words
from kimi_ops.agentic.world import BUSY, NOT_FOUND, Table, World

__all__ = [
    "FAMILIES", "NO_TOOL", "PLAIN", "SYSTEM", "Call", "Rubric", "Scene", "Task", "call_of",
    "described", "distinct", "fits_none", "linked", "make_task", "question", "subject",
]  # fmt: skip

NO_TOOL = "no tool for that"
PLAIN = "Plain answers only."
SYSTEM = "Use the tools."
SLACK = 1.3  # budget over what the teacher writes,
STYLE_ROOM = 16  # with praise of an answer
_READS, _WRITES = ("get", "find", "count", "sum", "use"), ("set", "add", "cancel", "move")


@dataclass(frozen=True)
class Call:
    """A call of the plan.

    Attributes
    ----------
    tool : str
    arguments : mapping of str to str
    about : str
        What the assistant says before it: the usage of the tool, which begins with a word of the
        wish; where another call waits for it, first what that one is about.
    """

    tool: str
    arguments: Mapping[str, str]
    about: str = ""

    def first_of(self, tool: Tool) -> Call:
        """The same, made so that this tool can be called.

        Examples
        --------
        >>> from kimi_ops.agentic.specs import DOMAINS, base_tools
        >>> from kimi_ops.agentic.tasks import Call
        >>> tool = base_tools(DOMAINS[0])[3]
        >>> Call("ticket_find", {"order": "elm"}, "ticket: order").first_of(tool).about
        'status after ticket: order'
        """
        return dataclasses.replace(self, about=f"{subject(tool.name)} after {self.about}")


Step = tuple[Call, ...] | str  # calls of one turn, or what is said


@dataclass(frozen=True)
class Rubric:
    """How one knows that a task was done.

    Attributes
    ----------
    goal : str
        Digest of the world at the end.
    outputs : tuple of str
        What the answers must hold, one after the other; of "tell" nothing: what it is worth is
        known to the evaluator alone.
    calls : tuple of Call
        That are expected, in this order.
    questions : int
        How often the assistant is to ask back.
    budget : int
        Bytes that the assistant may write.
    """

    goal: str
    outputs: tuple[str, ...]
    calls: tuple[Call, ...]
    questions: int
    budget: int


@dataclass(frozen=True)
class Task:
    """
    Attributes
    ----------
    family : str
    system : str
    tools : tuple of Tool
        That are declared.
    world : World
        Before the first call.
    user : tuple of str
        What the user says: first, and each time the assistant has ended a turn without a call.
    rubric : Rubric
    plan : tuple of Step
        What the teacher does, turn by turn; nobody else looks at it.
    """

    family: str
    system: str
    tools: tuple[Tool, ...]
    world: World
    user: tuple[str, ...]
    rubric: Rubric
    plan: tuple[Step, ...]


def subject(name: str) -> str:
    """What a tool is about, which is also a word of the wish: its name without the verb.

    Examples
    --------
    >>> from kimi_ops.agentic.tasks import subject
    >>> subject("status_get")
    'status'
    """
    return name.rpartition("_")[0]


def call_of(wish: Wish) -> Call:
    """The call that does it."""
    tool = wish.tool
    arguments = {}
    for parameter in tool.parameters["required"]:
        arguments[parameter] = wish.row if parameter == tool.semantics.key else wish.value
    return Call(tool.name, arguments, tool.about)


def question(tool: Tool) -> str:
    """What is asked of a user who left the value out."""
    return f"to which {tool.semantics.column}?"


def _size(call: Call) -> int:
    """Bytes of a call in its section, and of its subject before."""
    arguments = json.dumps(dict(call.arguments))
    return len(f"{call.about}, functions.{call.tool}:0{arguments}") + 6


def distinct(tool: Tool, others: Iterable[Tool]) -> bool:
    """Whether a tool has a name of its own, and no wish means it and another one, of which they do
    not the same."""
    meaning = tool.semantics
    for other in others:
        alike = _heard(tool) == _heard(other)
        same = (meaning.table, meaning.by) == (other.semantics.table, other.semantics.by)
        if tool.name == other.name or alike and not same:
            return False
    return True


def fits_none(tool: Tool, others: Iterable[Tool]) -> bool:
    """Whether the user of a tool speaks of nothing that the others know."""
    columns = {other.semantics.column for other in others} - {""}
    things = {other.domain.thing for other in others}
    return tool.semantics.column not in columns and tool.domain.thing not in things


def _heard(tool: Tool) -> str:
    """A wish of it."""
    return spoken(Wish(tool, "it"), random.Random(0), persona="terse")


@dataclass
class Scene:
    """Where a family makes up its task."""

    rng: random.Random
    fresh: bool
    repository: Sequence[Tool]
    tools: list[Tool] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)

    def words(self, count: int) -> list[str]:
        """Values and rows, none of which is also the name of a column or a thing."""
        named = {t.semantics.column for t in self.tools} | {t.domain.thing for t in self.tools}
        drawn = words(self.rng, count + len(named), fresh=self.fresh)
        return [one for one in drawn if one not in named][:count]

    def pick(self, *ops: str, table: str | None = None, **meaning: object) -> Tool | None:
        """A tool that fits, beside those there are, and is not meant by the words that mean one of
        them; None where there is none."""
        for _ in range(200):
            tool = self.rng.choice(self.repository)
            if ops and tool.semantics.op not in ops:
                continue
            if table is not None and tool.semantics.table != table:
                continue
            fitting = all(getattr(tool.semantics, key) == value for key, value in meaning.items())
            if fitting and distinct(tool, self.tools):
                self.tools.append(tool)
                return tool
        return None

    def settle(self, declared: int) -> None:
        """Other tools beside those of the task, and rows for all."""
        while len(self.tools) < declared:
            self.pick()
        self.rng.shuffle(self.tools)
        for name in sorted({tool.semantics.table for tool in self.tools}):
            meanings = [t.semantics for t in self.tools if t.semantics.table == name]
            columns = sorted({m.column for m in meanings} - {""} | {TICKET})
            numbers = {m.column for m in meanings if m.op == "sum"}
            rows = self.words(3)
            table: Table = {row: {} for row in rows}
            for column in columns:
                values = self.words(len(rows))
                if column in numbers:
                    values = [str(self.rng.randint(1, 9)) for _ in rows]
                for row, value in zip(rows, values, strict=True):
                    table[row][column] = value
            self.tables[name] = table

    def row(self, tool: Tool) -> str:
        return self.rng.choice(list(self.tables[tool.semantics.table]))

    def wish(self, tool: Tool, *, missing: bool = False) -> tuple[Wish, Call]:
        """Something to want of a tool, and the call that does it."""
        meaning, table = tool.semantics, self.tables[tool.semantics.table]
        row, value = self.row(tool), ""
        if missing or meaning.op == "add":
            row = next(word for word in self.words(9) if word not in table)
        if meaning.op in ("find", "count"):
            value = table[row][meaning.column]
        elif meaning.op in ("set", "move"):
            value = self.value(tool)
        if meaning.by and not missing:
            row = table[row][meaning.by]
        wish = Wish(tool, row, value)
        return wish, call_of(wish)

    def value(self, tool: Tool) -> str:
        """Something that a column may be set to."""
        return self.rng.choice(tool.choices) if tool.choices else self.words(1)[0]

    def task(
        self,
        family: str,
        user: Sequence[str],
        plan: Sequence[Step],
        *,
        outputs: Sequence[str],
        busy: int = 0,
        questions: int = 0,
        system: str = SYSTEM,
    ) -> Task:
        """With the rubric that the plan's end in the world makes."""
        world = World(tuple(self.tools), self.tables, busy)
        end, written = world.copy(), 0
        for step in plan:
            if isinstance(step, str):
                written += len(step) + STYLE_ROOM
                continue
            answers = [BUSY]
            while BUSY in answers:  # as the teacher does, which tries the turn again
                answers = [end.call(call.tool, call.arguments) for call in step]
                written += sum(_size(call) for call in step)
        called = tuple(call for step in plan if not isinstance(step, str) for call in step)
        budget = round(SLACK * written)
        rubric = Rubric(end.digest(), tuple(outputs), called, questions, budget)
        return Task(family, system, tuple(self.tools), world, tuple(user), rubric, tuple(plan))

    def result(self, *calls: Call) -> str:
        """What the last of these calls answers."""
        world = World(self.tools, self.tables).copy()
        return [world.call(call.tool, call.arguments) for call in calls][-1]


def _one(scene: Scene, family: str, ops: tuple[str, ...], declared: int) -> Task | None:
    tool = scene.pick(*ops, looked_up=False)
    if tool is None:
        return None
    scene.settle(declared)
    wish, call = scene.wish(tool)
    result = scene.result(call)
    return scene.task(family, [spoken(wish, scene.rng)], [(call,), result], outputs=[result])


def _lookup(scene: Scene, declared: int) -> Task | None:
    return _one(scene, "lookup", _READS, declared)


def _write(scene: Scene, declared: int) -> Task | None:
    return _one(scene, "write", _WRITES, declared)


def linked(scene: Scene) -> tuple[Tool, Tool] | None:
    """A tool, and one that takes what it finds, or may be called only then; None where the draw
    brought no such two."""
    second = scene.pick("get", "set", "cancel", "move")
    if second is None or not second.semantics.key:
        return None
    table, guarded = second.semantics.table, second.semantics.looked_up
    first = scene.pick("get", table=table, by="") if guarded else None
    if not guarded:
        by = second.semantics.by
        first = scene.pick("get", table=table, column=by) if by else scene.pick("find", table=table)
    if first is None or first.semantics.column == second.semantics.column:
        return None
    return first, second


def _chain(scene: Scene, declared: int) -> Task | None:
    """Find, then read or write what was found; or look up first what may only be changed then."""
    rng, both = scene.rng, linked(scene)
    if both is None:
        return None
    first, second = both
    scene.settle(max(declared, 2))
    wish, call = scene.wish(second)
    if second.semantics.looked_up:
        before = call_of(Wish(first, wish.row)).first_of(second)
        said = spoken(wish, rng)
    else:
        opening, found = scene.wish(first)
        before = found.first_of(second)
        wish = Wish(second, scene.result(before), wish.value)
        call = call_of(wish)
        said = spoken(Wish(second, described(opening), wish.value), rng)
    result = scene.result(before, call)
    return scene.task("chain", [said], [(before,), (call,), result], outputs=[result])


def described(wish: Wish) -> str:
    """What the user says for a thing whose name or ticket he does not know."""
    meaning = wish.tool.semantics
    if meaning.op == "find":
        return f"the {wish.tool.domain.thing} with {meaning.column} {wish.value}"
    return f"the {meaning.column} of {wish.row}"


def _none(scene: Scene, declared: int) -> Task | None:
    """The tool for it is not there."""
    tool = scene.pick(looked_up=False)
    if tool is None:
        return None
    scene.settle(declared + 1)
    wish, _ = scene.wish(tool)
    scene.tools.remove(tool)
    if not fits_none(tool, scene.tools):
        return None
    said, answer = spoken(wish, scene.rng), f"{subject(tool.name)}: {NO_TOOL}"
    return scene.task("none", [said], [answer], outputs=[NO_TOOL])


def _fault(scene: Scene, declared: int) -> Task | None:
    tool = scene.pick(*_READS, *_WRITES, looked_up=False)
    if tool is None:
        return None
    scene.settle(declared)
    gone = tool.semantics.key and tool.semantics.op != "add" and not tool.semantics.fallback
    if gone and scene.rng.random() < 0.5:
        wish, call = scene.wish(tool, missing=True)
        return scene.task(
            "fault", [spoken(wish, scene.rng)], [(call,), NOT_FOUND], outputs=[NOT_FOUND]
        )
    wish, call = scene.wish(tool)
    result, busy = scene.result(call), scene.rng.choice((1, 1, 2))
    said = spoken(wish, scene.rng)
    return scene.task("fault", [said], [(call,), result], outputs=[result], busy=busy)


def _ask(scene: Scene, declared: int) -> Task | None:
    tool = scene.pick("set", "move", looked_up=False)
    if tool is None:
        return None
    scene.settle(declared)
    wish, call = scene.wish(tool)
    said = spoken(Wish(tool, wish.row), scene.rng)
    result = scene.result(call)
    return scene.task(
        "ask", [said, wish.value], [question(tool), (call,), result],
        outputs=[tool.semantics.column, result], questions=1,
    )  # fmt: skip


def _pair(scene: Scene, declared: int) -> Task | None:
    tools = [scene.pick(*_READS, looked_up=False) for _ in range(2)]
    if None in tools:
        return None
    scene.settle(max(declared, 2))
    wishes, calls = zip(*(scene.wish(tool) for tool in tools if tool), strict=True)
    results = [scene.result(call) for call in calls]
    said = together(wishes, scene.rng)
    return scene.task("pair", [said], [tuple(calls), ", ".join(results)], outputs=results)


def _tell(scene: Scene, declared: int) -> Task | None:
    tool = scene.pick("get", looked_up=False, by="")
    if tool is None:
        return None
    scene.settle(declared)
    wish, call = scene.wish(tool)
    result = scene.result(call)
    said = f"tell me about the {tool.semantics.column} of {wish.row}"
    answer = f"the {tool.semantics.column} is {result}"
    return scene.task("tell", [said], [(call,), answer], outputs=[])


FAMILIES: Mapping[str, Callable[[Scene, int], Task | None]] = {
    "lookup": _lookup,
    "write": _write,
    "chain": _chain,
    "none": _none,
    "fault": _fault,
    "ask": _ask,
    "pair": _pair,
    "tell": _tell,
}


def make_task(
    family: str, repository: Sequence[Tool], rng: random.Random, *, fresh: bool, declared: int = 2
) -> Task:
    """A task of a family.

    Parameters
    ----------
    family : str
        A key of `FAMILIES`.
    repository : sequence of Tool
        To choose from.
    rng : random.Random
    fresh : bool
        Keys and values are words that training never sees.
    declared : int
        Tools that are declared.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.specs import DOMAINS, base_tools
    >>> from kimi_ops.agentic.tasks import make_task
    >>> task = make_task("lookup", base_tools(DOMAINS[0]), random.Random(2), fresh=False)
    >>> len(task.tools), len(task.rubric.calls), task.plan[-1] == task.rubric.outputs[0]
    (2, 1, True)
    """
    while True:
        made = FAMILIES[family](Scene(rng, fresh, repository), declared)
        if made is not None:
            return made
