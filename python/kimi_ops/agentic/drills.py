# SPDX-License-Identifier: MIT
"""Short texts in which a word comes again: a model that cannot copy one calls no tool it has not
seen. Copying is learnt in short rows first, and then stretched."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from kimi_ops.agentic.specs import Tool
from kimi_ops.agentic.tasks import NO_TOOL, distinct, fits_none, subject
from kimi_ops.agentic.users import Wish, spoken
from kimi_ops.agentic.words import words
from kimi_ops.models.kimi_k2.chat import ByteTokenizer, declare_typescript
from kimi_ops.models.kimi_k2.chat.dialogue import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_USER,
    SECTION_BEGIN,
)

__all__ = ["choices", "recall", "repeats", "search"]

Drill = tuple[list[int], list[bool]]  # bytes, and which of them the row's beginning decides
NONE_SHARE = 0.15  # of the wishes that are of none of the tools
UNHEARD_SHARE = 0.4  # of the tools whose verb is a word


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


def search(rng: random.Random, phrases: int) -> Drill:
    """Phrases of two or three words, as tools are declared, then words of some of them other than
    the first, each with the phrase that it is of.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.drills import search
    >>> text, learned = search(random.Random(1), 2)
    >>> head, _, asked = bytes(text).decode().partition("\\n")
    >>> word, _, phrase = asked.splitlines()[0].partition("?")
    >>> phrase in head.split(" ") and word in phrase
    True
    """
    drawn = words(rng, 3 * phrases, fresh=False)
    known = []
    for place in range(phrases):
        first, second, third = drawn[3 * place : 3 * place + 3]
        known.append((first, second, third) if rng.random() < 0.5 else (first, second))
    spelled = [f"{one[0]}_{one[1]}({''.join(one[2:])})" for one in known]
    ids = list((" ".join(spelled) + "\n").encode())
    learned = [False] * len(ids)
    for place in rng.sample(range(phrases), phrases // 2 + 1):
        key, phrase = f"{rng.choice(known[place][1:])}?".encode(), f"{spelled[place]}\n".encode()
        ids += key + phrase
        learned += [False] * len(key) + [True] * len(phrase)
    return ids, learned


def choices(rng: random.Random, tools: Sequence[Tool], count: int, *, short: bool) -> Drill:
    """Tools, then wishes, each with what it is about, its tool's name and that tool's first field:
    the choice alone, without the rest of a call.

    Parameters
    ----------
    rng : random.Random
    tools : sequence of Tool
        To choose from.
    count : int
        Of the tools; each is wished for once, or another that is not there.
    short : bool
        Each tool is a word and its fields, and nobody's turn has a head; or all is as in a
        conversation.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.drills import choices
    >>> from kimi_ops.agentic.specs import DOMAINS, base_tools
    >>> text, learned = choices(random.Random(1), base_tools(DOMAINS[0]), 2, short=True)
    >>> answers = bytes(one for one, on in zip(text, learned) if on).decode(errors="replace")
    >>> about, name = answers.partition(":")[0].split("\N{REPLACEMENT CHARACTER}")
    >>> name.startswith(about) and f"{name}(" in bytes(text).decode(errors="replace")
    True
    """
    known: list[Tool] = []
    while len(known) < count:
        tool = rng.choice(tools)
        if distinct(tool, known):
            known.append(_unheard(tool, rng) if rng.random() < UNHEARD_SHARE else tool)
    if short:
        declared = " ".join(f"{t.name}({','.join(t.parameters['properties'])})" for t in known)
    else:
        declared = declare_typescript([tool.declaration for tool in known]).partition("{\n")[2]
    marker = ByteTokenizer().markers
    head = [marker[IM_ASSISTANT], *b"assistant", marker[IM_MIDDLE]]
    call = [marker[CALL_BEGIN], *b"functions."]
    ids = list(declared.encode())
    learned = [False] * len(ids)
    for tool in rng.sample(known, count):
        other = rng.choice(tools)
        none = rng.random() < NONE_SHARE and fits_none(other, known)
        row, value = words(rng, 2, fresh=False)
        asked = spoken(Wish(other if none else tool, row, value), rng)
        ids += [marker[IM_USER], *asked.encode(), marker[IM_END], *([] if short else head)]
        learned += [False] * (len(ids) - len(learned))
        about = subject((other if none else tool).name)
        if none:
            ids += f"{about}: {NO_TOOL}".encode()
            learned += [True] * (len(ids) - len(learned))
            continue
        ids += [*about.encode(), marker[SECTION_BEGIN]]
        learned += [True] * (len(ids) - len(learned))
        ids += [] if short else call
        learned += [False] * (len(ids) - len(learned))
        ids += f"{tool.name}:".encode()
        learned += [True] * (len(ids) - len(learned))
        ids += [] if short else [ord("0"), marker[ARGUMENT_BEGIN], *b'{"']
        learned += [False] * (len(ids) - len(learned))
        ids += "".join(f'{field}"' for field in tool.parameters["required"][:1]).encode()
        learned += [True] * (len(ids) - len(learned))
    return ids, learned


def _unheard(tool: Tool, rng: random.Random) -> Tool:
    """With a verb that is none, so that a name has to be read and cannot be known."""
    (verb,) = words(rng, 1, fresh=False)
    return dataclasses.replace(tool, name=f"{subject(tool.name)}_{verb}")
