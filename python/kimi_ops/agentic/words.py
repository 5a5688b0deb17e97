# SPDX-License-Identifier: MIT
"""Words for keys and values: English ones and made-up ones, a fifth of them kept from training.

Of the words of training a quarter are letters by chance: nobody can guess how such a word goes on,
so that copying is all that helps.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

__all__ = ["HELD_OUT_SHARE", "english", "held_out", "word", "words"]

HELD_OUT_SHARE, LETTERS_SHARE = 0.2, 0.25
_ENGLISH = """
acorn amber anchor apple apron arrow aspen atlas badge bagel barn basil basin beach bead bean berry
birch bison bloom board boat bolt bread breeze brick bridge brook broom brush bucket cabin cable
cactus camel candle canoe canyon carol cedar chalk cherry chess cider circle clay cliff clock clover
coast cobalt comet copper coral cotton crane creek crown crystal daisy delta desert dome dragon drum
dune eagle echo elm ember falcon feather fern fiddle field flint flute fog forest fossil fox frost
garden garnet ginger glacier globe goat grape gravel grove hammer harbor harp hawk hazel heron hill
honey horn ice indigo iris iron island ivory ivy jade jasmine jungle kayak kettle kite ladder lagoon
lake lantern larch lark lemon lily linen lion lotus lunar maple marble marsh meadow melon mesa mint
mirror moon moss moth mustard nectar nest nickel north nutmeg oak oasis ocean olive onyx opal orbit
orchid otter owl palm panda paper peach pearl pebble pepper piano pine planet plum pond poppy prism
quartz quill rabbit rain raven reed ridge river robin rocket rose ruby saddle sage sand satin shell
silk silver slate snow solar spark spruce star steel stone storm straw sugar swan thistle thorn tide
tiger timber topaz torch tulip tundra turtle valley velvet violet walnut wave wheat willow winter
wolf wool zebra zinc
"""
_ONSETS = "b bl br d dr f fl g gl gr h j k kl kr l m n p pl pr r s sk sl sp st t tr v w z"
_VOWELS, _CODAS = "aeiou", "bdfgklmnprstxz"


def held_out(one: str) -> bool:
    """Whether a word is kept from all training data: decided by its SHA-256, for ever."""
    first = int.from_bytes(hashlib.sha256(one.encode()).digest()[:4], "big")
    return first < HELD_OUT_SHARE * 2**32


def english(rng: random.Random) -> str:
    return rng.choice(_ENGLISH.split())


def _made_up(rng: random.Random) -> str:
    """One or two syllables, three to seven letters."""
    count = rng.choice((1, 2, 2))
    parts = [rng.choice(_ONSETS.split()) + rng.choice(_VOWELS) for _ in range(count)]
    made = "".join(parts) + rng.choice(_CODAS)
    return made[:7]


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7)))


def word(rng: random.Random, *, fresh: bool, avoid: Callable[[str], bool] | None = None) -> str:
    """A word, English or made up by equal chance, or one of letters by chance where it is to train.

    Parameters
    ----------
    rng : random.Random
    fresh : bool
        One of those that training never sees, or one of the others.
    avoid : callable, optional
        Words that may not come.

    Examples
    --------
    >>> import random
    >>> from kimi_ops.agentic.words import held_out, word
    >>> held_out(word(random.Random(1), fresh=True)), held_out(word(random.Random(1), fresh=False))
    (True, False)
    """
    while True:
        if not fresh and rng.random() < LETTERS_SHARE:
            one = _letters(rng)
        else:
            one = english(rng) if rng.random() < 0.5 else _made_up(rng)
        if held_out(one) == fresh and not (avoid is not None and avoid(one)):
            return one


def words(rng: random.Random, count: int, *, fresh: bool) -> list[str]:
    """Different words, none of which begins as another does."""
    found: list[str] = []

    def near(one: str) -> bool:
        return any(one.startswith(other) or other.startswith(one) for other in found)

    while len(found) < count:
        found.append(word(rng, fresh=fresh, avoid=near))
    return found
