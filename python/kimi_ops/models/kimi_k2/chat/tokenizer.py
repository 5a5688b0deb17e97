# SPDX-License-Identifier: MIT
"""The tokenizer that belongs to a model folder: the folder's own, or bytes."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from kimi_ops.models.kimi_k2.chat.byte_tokenizer import ByteTokenizer
from kimi_ops.models.kimi_k2.chat.dialogue import MARKERS, Chat, Message, normalised, render
from kimi_ops.models.kimi_k2.config import KimiK2Config

__all__ = ["Tokenizer", "TransformersTokenizer", "load_tokenizer"]

FILES = ("tokenizer.json", "tokenizer_config.json", "tiktoken.model", "tokenizer.model")


class TextStream(Protocol):
    """Text of ids that come one by one."""

    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer(Protocol):
    """What chat, tool calls and generation need of a tokenizer."""

    @property
    def markers(self) -> Mapping[str, int]:
        """Ids of the special tokens, by their spelling."""

    @property
    def source(self) -> str:
        """What it is and where it came from."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, whatever it spells."""

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def text_stream(self) -> TextStream: ...

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> Chat:
        """A conversation in the format that the model was trained on."""


def _error(expected: str, came: object, mend: str) -> ValueError:
    return ValueError(f"load_tokenizer: folder: expected {expected}, got {came}; {mend}")


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model folder; its `source` says which.

    Where the folder has tokenizer files transformers reads them, and its template, where there is
    one, is the template. A folder without them whose vocabulary is the 256 bytes is read byte by
    byte.

    Parameters
    ----------
    folder : path
        Of a checkpoint.
    trust_remote_code : bool
        Whether code in the folder may run: the released K2 brings its tokenizer as code.

    Raises
    ------
    ValueError
        No tokenizer for this vocabulary, or one that cannot be read or does not fit the model.
    ImportError
        Tokenizer files and no transformers.

    Examples
    --------
    >>> import tempfile
    >>> from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
    >>> from kimi_ops.models.kimi_k2.chat import load_tokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     KimiK2(KimiK2Config.mini()).save_pretrained(folder)
    ...     load_tokenizer(folder).source
    'bytes, with the special tokens in F5 to FE'
    """
    folder = Path(folder)
    config = folder / "config.json"
    size = None
    if config.exists():
        size = KimiK2Config.from_file(config, text_only=True).vocab_size
    if not any((folder / name).exists() for name in FILES):
        if size != ByteTokenizer.vocab_size:
            raise _error(
                f"{', '.join(FILES)} or a model of {ByteTokenizer.vocab_size} byte values",
                f"a vocabulary of {size} in {folder}",
                "put the tokenizer's files beside the weights",
            )
        return ByteTokenizer()
    try:
        from transformers import AutoTokenizer, PreTrainedConfig
    except ImportError as error:
        raise ImportError(
            f"load_tokenizer: {folder}: its tokenizer is read by transformers: "
            "pip install transformers"
        ) from error
    try:
        found = AutoTokenizer.from_pretrained(
            str(folder),
            config=PreTrainedConfig(),  # it does not read that of every model
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _error("a tokenizer that transformers reads", error, "restore its files") from error
    tokens = found.get_vocab().items()
    name, highest = max(tokens, key=lambda item: item[1], default=("", -1))
    if size is not None and highest >= size:
        raise _error(
            f"at most the {size} tokens of the model",
            f"id {highest} for {name!r} in the tokenizer of {folder}",
            "take the tokenizer that belongs to the model",
        )
    return TransformersTokenizer(found, f"{type(found).__name__} of transformers, from {folder}")


class TransformersTokenizer:
    """A tokenizer of transformers, with its template where it has one.

    Texts of messages cannot forge special tokens: a spelling is encoded as the text it is.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    source : str

    Raises
    ------
    ValueError
        A tokenizer without the markers that its template needs, or one that reads text differently
        in pieces.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self.markers: dict[str, int] = dict(tokenizer.get_added_vocab())
        spelled = "|".join(re.escape(m) for m in sorted(self.markers, key=len, reverse=True))
        self._marker = re.compile(f"({spelled})" if spelled else r"(?!)")
        if not tokenizer.chat_template and not self.markers.keys() >= set(MARKERS):
            missing = ", ".join(m for m in MARKERS if m not in self.markers)
            raise _error("a chat template or K2's special tokens", f"no {missing}", "add them")
        self._probe()

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, whatever it spells."""
        cuts = [one.start() + 1 for one in self._marker.finditer(text)]  # inside every spelling
        parts = (text[a:b] for a, b in pairwise([0, *cuts, len(text)]))
        return [one for part in parts for one in self._plain(part)]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(map(int, token_ids))))

    def text_stream(self) -> TextStream:
        return _WholeCharacters(self)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> Chat:
        """A conversation by the tokenizer's own template, else by K2's."""
        if not self._tokenizer.chat_template:
            return render(messages, tools, generation_prompt=generation_prompt)
        messages = normalised(messages)
        filler = _unused_character([messages, tools])
        text = self._tokenizer.apply_chat_template(
            self._disguised(messages, filler),
            tools=self._disguised(list(tools), filler) if tools else None,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
        return Chat.of([part.replace(filler, "") for part in self._marker.split(text)])

    def _disguised(self, value: Any, filler: str) -> Any:
        """The same without the spelling of a marker in any text."""
        if isinstance(value, str):
            return self._marker.sub(lambda one: one[0][0] + filler + one[0][1:], value)
        if isinstance(value, Mapping):
            return {
                self._disguised(k, filler): self._disguised(one, filler) for k, one in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._disguised(one, filler) for one in value]
        return value

    def _probe(self) -> None:
        """Pieces between markers have to be read as the whole is, and spellings as text."""
        text = "".join(f"{marker}a word, {marker} another" for marker in self.markers)
        pieces = Chat.of(self._marker.split(text))
        if pieces.encode(self)[0] != self._plain(text):
            raise _error(
                "a tokenizer that reads text between special tokens by itself",
                self.source,
                "use one whose special tokens do not strip what is beside them",
            )
        for marker in self.markers:
            ids = self.encode(marker)
            if self.decode(ids) != marker or not set(self.markers.values()).isdisjoint(ids):
                raise _error(
                    f"{marker} as ordinary text to be read as such",
                    f"ids {ids} of {self.decode(ids)!r}",
                    "use a tokenizer of bytes, without prefix spaces",
                )


class _WholeCharacters:
    """Ids held back until they end with a whole character."""

    def __init__(self, tokenizer: TransformersTokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._tokenizer.decode(self._held)
        if text.endswith("\ufffd"):
            return ""
        self._held = []
        return text

    def flush(self) -> str:
        held, self._held = self._held, []
        return self._tokenizer.decode(held) if held else ""


def _unused_character(value: Any) -> str:
    """A private character that no text has."""
    text = json.dumps(value, ensure_ascii=False)
    return next(one for one in map(chr, range(0xE000, 0xF900)) if one not in text)
