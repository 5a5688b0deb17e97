# SPDX-License-Identifier: MIT
"""Short texts in which a word comes again: a model that cannot copy one calls no tool it has not
seen. Copying is learnt in short rows first, and then stretched."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from kimi_ops.agentic.specs import Tool, usage
from kimi_ops.agentic.tasks import (
    NO_TOOL,
    Call,
    Scene,
    Step,
    call_of,
    described,
    fits_none,
    linked,
    question,
    subject,
)
from kimi_ops.agentic.teacher import section
from kimi_ops.agentic.users import Wish, spoken, together
from kimi_ops.agentic.words import words
from kimi_ops.agentic.world import BUSY, DONE, NOT_FOUND
from kimi_ops.models.kimi_k2.chat import ByteTokenizer, Chat, declare_typescript
from kimi_ops.models.kimi_k2.chat.dialogue import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_SYSTEM,
    IM_USER,
)

__all__ = ["recall", "repeats", "search", "wishes"]

Drill = tuple[list[int], list[bool]]  # bytes, and which of them the row's beginning decides
# Who speaks, a user or a tool, what, and what the assistant does; nothing before the second result.
Turn = tuple[str, str, Step | None]
USER = "user"
UNHEARD_SHARE = 0.4  # of the tools whose verb is a word
NONE_SHARE = 0.15  # of the wishes that are of none of the tools,
ASK_SHARE = 0.3  # of those that take a value, without it,
PAIR_SHARE = 0.7  # of two at once
CHAIN_SHARE = 0.4  # of the rows with a wish that takes two calls
RESULT_SHARE = 0.6  # of single calls, and of two at once, that are answered,
FAULT_SHARE = 0.4  # and of single ones by a fault


def repeats(rng: random.Random, length: int) -> Drill:
    """A phrase of one to three words, again and again.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.drills import repeats
    >>> text, learned = repeats(random.Random(1), 20)
    >>> bytes(text), learned.index(True)
    (b'trit.trit.trit.trit.', 5)
    """
    count = 1 if length < 64 else rng.randint(1, 3)
    phrase = f"{' '.join(words(rng, count, fresh=False))}.".encode()
    times = max(2, length // len(phrase))
    return list(phrase * times), [False] * len(phrase) + [True] * (len(phrase) * (times - 1))


def recall(rng: random.Random, pairs: int) -> Drill:
    """Pairs of key and value, then some of the keys, whose values are to be found.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.drills import recall
    >>> text, learned = recall(random.Random(1), 2)
    >>> asked = bytes(one for one, on in zip(text, learned) if on).decode().removesuffix(".")
    >>> f"={asked} " in bytes(text).decode()
    True
    """
    keys, values = words(rng, pairs, fresh=False), words(rng, pairs, fresh=False)
    ids = list(" ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True)).encode())
    ids.append(ord(" "))
    learned = [False] * len(ids)
    for place in rng.sample(range(pairs), max(1, pairs // 2)):
        key, value = f"{keys[place]}=".encode(), f"{values[place]}.".encode()
        ids += key + value
        learned += [False] * len(key) + [True] * len(value)
    return ids, learned


def search(rng: random.Random, tools: int) -> Drill:
    """What tools are about, their fields and names, then words with values: of which tool the word
    is, its fields, its name, and the call.

    Examples
    --------
    >>> import random, re
    >>> from kimi_ops.agentic.drills import search
    >>> from kimi_ops.models.kimi_k2.chat import ByteTokenizer
    >>> text, learned = search(random.Random(4), 2)
    >>> print(re.sub("<.*?>", "|", ByteTokenizer().decode(text)).rstrip())
    smc: yaqg smc_xutfnhe
    kotuk: bros, wigred kotuk_forest
    smc furop?smc: yaqg|smc_xutfnhe:0|{"yaqg": "furop"}
    kotuk planet oak?kotuk: bros, wigred|kotuk_forest:0|{"bros": "planet", "wigred": "oak"}
    """
    drawn = words(rng, 6 * tools, fresh=False)
    known = []
    for first in range(0, len(drawn), 6):
        one, two, *rest = drawn[first : first + 6]
        count = rng.randint(1, 2)
        known.append((f"{one}_{two}", rest[:count], rest[2:][:count]))
    ids: list[int] = []
    learned: list[bool] = []

    def write(text: str, *, found: bool = False) -> None:
        ids.extend(text.encode())
        learned.extend([found] * (len(ids) - len(learned)))

    for name, fields, _ in known:
        write(f"{usage(name, fields)} {name}\n")
    markers = ByteTokenizer().markers
    for name, fields, values in rng.sample(known, tools // 2 + 1):
        write(f"{subject(name)} {' '.join(values)}?")
        write(usage(name, fields), found=True)
        ids.append(markers[CALL_BEGIN])
        write(f"{name}:", found=True)
        write("0")
        ids.append(markers[ARGUMENT_BEGIN])
        for place, (field, value) in enumerate(zip(fields, values, strict=True)):
            write(', "' if place else '{"')
            write(f'{field}"', found=True)
            write(': "')
            write(f'{value}"', found=True)
        write("}\n")
    return ids, learned


def wishes(rng: random.Random, tools: Sequence[Tool], count: int, *, short: bool) -> Drill:
    """Tools, then wishes of several kinds, each with what the assistant does: its calls, a question
    back, or that no tool fits; half of the results stand there, with what comes of them.

    Parameters
    ----------
    rng : random.Random
    tools : sequence of Tool
        To choose from.
    count : int
        Of the tools, at least two; each is wished for once, or another that is not there.
    short : bool
        Each tool is a word and its fields, and no turn has a head; or all is as in a conversation.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.drills import wishes
    >>> from kimi_ops.agentic.specs import DOMAINS, base_tools
    >>> text, learned = wishes(random.Random(0), base_tools(DOMAINS[0]), 2, short=True)
    >>> answers = bytes(one for one, on in zip(text, learned) if on).decode(errors="replace")
    >>> about, _, called = answers.partition("\N{REPLACEMENT CHARACTER}")
    >>> about, "functions.order_" in called
    ('order: order', True)
    """
    scene = Scene(rng, False, tools)
    chained, chain = rng.random() < CHAIN_SHARE, None
    while chained and chain is None:
        scene.tools.clear()
        chain = linked(scene)
    while len(scene.tools) < count:
        scene.pick(looked_up=False)
    known = [_unheard(tool, rng) if rng.random() < UNHEARD_SHARE else tool for tool in scene.tools]
    declared = rng.sample(known, len(known))
    talks = [_chained(rng, known[1], known[0])] if chain else []
    talks += _alone(rng, known[2:] if chain else known, declared, tools)
    rng.shuffle(talks)
    if short:
        text = "\n".join(f"{tool.about} {tool.name}" for tool in declared)
    else:
        text = declare_typescript([tool.declaration for tool in declared]).partition("{\n")[2]
    parts: list[str] = []
    number = 0  # of calls so far
    for name, said, reply in (turn for talk in talks for turn in talk):
        role = IM_USER if name == USER else IM_SYSTEM
        place = number - (2 if reply is None else 1)
        told = said if name == USER else f"## Return of functions.{name}:{place}\n{said}"
        parts += ["", role, *([] if short else [name, IM_MIDDLE]), told, IM_END]
        if reply is None:
            continue
        parts += ["", IM_ASSISTANT, "" if short else "assistant", IM_MIDDLE]
        parts += [reply, IM_END] if isinstance(reply, str) else section(reply, number)
        number += 0 if isinstance(reply, str) else len(reply)
    parts[0] = text
    return Chat.of(parts).encode(ByteTokenizer())


def _alone(
    rng: random.Random, wanted: Sequence[Tool], declared: Sequence[Tool], tools: Sequence[Tool]
) -> list[list[Turn]]:
    """A wish of each tool, or of one that is not there; two at once; or one without its value."""
    talks: list[list[Turn]] = []
    left = list(wanted)
    while left:
        tool, other = left.pop(), rng.choice(tools)
        wish = _wish(rng, tool)
        if rng.random() < NONE_SHARE and fits_none(other, declared):
            asked = spoken(_wish(rng, other), rng)
            talks.append([(USER, asked, f"{subject(other.name)}: {NO_TOOL}")])
        elif wish.value and wish.row and rng.random() < ASK_SHARE:
            asked = spoken(Wish(tool, wish.row), rng)
            talks.append([(USER, asked, question(tool)), (USER, wish.value, (call_of(wish),))])
        elif left and rng.random() < PAIR_SHARE:
            both = (wish, _wish(rng, left.pop()))
            talks.append([(USER, together(both, rng), tuple(map(call_of, both)))])
            if rng.random() < RESULT_SHARE:
                one, two = (_result(rng, wish.tool) for wish in both)
                first, second = (wish.tool.name for wish in both)
                talks[-1] += [(first, one, None), (second, two, f"{one}, {two}")]
        else:
            talks.append([(USER, spoken(wish, rng), (call_of(wish),))])
            if rng.random() < RESULT_SHARE:
                talks[-1] += _answered(rng, tool, call_of(wish))
    return talks


def _answered(rng: random.Random, tool: Tool, call: Call) -> list[Turn]:
    """What the tool says to a call, and the assistant then: again where it was busy."""
    fault = rng.choice((BUSY, NOT_FOUND)) if rng.random() < FAULT_SHARE else None
    if fault == BUSY:
        return [(tool.name, BUSY, (call,))]
    result = fault or _result(rng, tool)
    return [(tool.name, result, result)]


def _result(rng: random.Random, tool: Tool) -> str:
    """Something that a tool may answer."""
    if tool.changes:
        return DONE
    if tool.semantics.op in ("sum", "count"):
        return str(rng.randint(1, 27))
    return words(rng, 1, fresh=False)[0]


def _chained(rng: random.Random, first: Tool, second: Tool) -> list[Turn]:
    """A wish of the second tool, for which the first one is called before."""
    wish, found = _wish(rng, second), _wish(rng, first)
    if second.semantics.looked_up:
        asked, opening = spoken(wish, rng), call_of(Wish(first, wish.row))
        result = _result(rng, first)
    else:
        asked = spoken(Wish(second, described(found), wish.value), rng)
        opening, result = call_of(found), wish.row
    turn = (opening.first_of(second),)
    return [(USER, asked, turn), (first.name, result, (call_of(wish),))]


def _wish(rng: random.Random, tool: Tool) -> Wish:
    """Of a tool, with words for what its call takes."""
    row, value = words(rng, 2, fresh=False)
    if tool.choices:
        value = rng.choice(tool.choices)
    meaning = tool.semantics
    return Wish(tool, row if meaning.key else "", value if meaning.value else "")


def _unheard(tool: Tool, rng: random.Random) -> Tool:
    """With a verb that is none, so that a name has to be read and cannot be known."""
    (verb,) = words(rng, 1, fresh=False)
    return dataclasses.replace(tool, name=f"{subject(tool.name)}_{verb}")
