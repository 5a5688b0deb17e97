# SPDX-License-Identifier: MIT
"""Text as UTF-8 bytes, and Kimi K2's special tokens as bytes that no UTF-8 text holds.

    F5 im_end     F7 im_assistant  F9 im_middle            FC tool_call_begin
    F6 im_user    F8 im_system     FA, FB section's ends   FD argument_begin, FE tool_call_end

The vocabulary stays the 256 bytes; C0, C1 and FF are free.
"""

import codecs
from collections.abc import Mapping, Sequence
from itertools import groupby
from types import MappingProxyType

from kimi_ops.models.kimi_k2.chat.dialogue import MARKERS, render

__all__ = ["ByteTokenizer"]

_IDS = MappingProxyType({marker: 0xF5 + place for place, marker in enumerate(MARKERS)})
_SPELLINGS = {place: marker for marker, place in _IDS.items()}


class ByteTokenizer:
    """The tokenizer of the byte models: `mini`, and what `kimi-ops train` writes.

    Examples
    --------
    >>> from kimi_ops.models.kimi_k2.chat import ByteTokenizer
    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("h\\u00e9")
    [104, 195, 169]
    >>> tokenizer.encode("<|im_end|>")[:3], tokenizer.markers["<|im_end|>"]
    ([60, 124, 105], 245)
    >>> tokenizer.decode([104, 195, 245])
    'h\\ufffd<|im_end|>'
    """

    vocab_size = 256
    source = "bytes, with the special tokens in F5 to FE"
    render = staticmethod(render)

    @property
    def markers(self) -> Mapping[str, int]:
        """Ids of the special tokens, by their spelling."""
        return _IDS

    def encode(self, text: str) -> list[int]:
        """The bytes of a text; the spelling of a special token is text like any other.

        Raises
        ------
        UnicodeEncodeError
            Half of a surrogate pair, which UTF-8 has no bytes for.
        """
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of bytes, special tokens as they are spelled or left out; what is not UTF-8 becomes
        the replacement character.

        Raises
        ------
        ValueError
            An id that is no byte.
        """
        found = []
        for special, run in groupby(map(int, token_ids), key=_SPELLINGS.__contains__):
            if not special:
                found.append(bytes(run).decode(errors="replace"))
            elif not skip_special_tokens:
                found += [_SPELLINGS[one] for one in run]
        return "".join(found)

    def text_stream(self) -> "ByteStream":
        """A decoder of text that comes byte by byte."""
        return ByteStream()


class ByteStream:
    """The text so far, character by character: `decode` of all bytes, whatever came with which."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that a byte completes; it may be the first of several."""
        return self._decoder.decode(bytes((token_id,)))

    def flush(self) -> str:
        """What is left at the end of a text; the next byte begins another."""
        return self._decoder.decode(b"", final=True)
