# SPDX-License-Identifier: MIT
"""Short texts in which a word comes again: a model that cannot copy one calls no tool it has not
seen. Copying is learnt in short rows first, and then stretched."""

from __future__ import annotations

import random

from kimi_ops.agentic.words import words

__all__ = ["recall", "repeats", "search"]

Drill = tuple[list[int], list[bool]]  # bytes, and which of them the row's beginning decides


def repeats(rng: random.Random, length: int) -> Drill:
    """A phrase of one to three words, again and again.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.drills import repeats
    >>> text, learned = repeats(random.Random(1), 20)
    >>> bytes(text), learned.index(True)
    (b'wool.wool.wool.wool.', 5)
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
