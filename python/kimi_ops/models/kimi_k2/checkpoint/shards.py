# SPDX-License-Identifier: MIT
"""The safetensors files of one checkpoint folder, read some rows of a tensor at a time."""

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Of a model that sees: what its language model's names begin with, and those of the rest.
_TEXT, _VISION = "language_model.", ("vision_tower.", "mm_projector.")
_SLAB = 2 << 20  # bytes that are read at once: what becomes of them stays in the cache

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def _error(what: str, expected: str, came: str, mend: str) -> ValueError:
    return ValueError(f"from_pretrained: {what}: expected {expected}, got {came}; {mend}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; two values under one name are a ValueError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice")
    return values


class _File:
    """One safetensors file, whose header the library has held against its size."""

    def __init__(self, path: Path, opened: ExitStack) -> None:
        self.path = path
        try:
            self._file: Any = opened.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise _error(
                "folder", f"{path} as a whole safetensors file", str(error), "restore the file"
            ) from None
        self.places = {name: number for number, name in enumerate(self._file.offset_keys())}
        self._headers: dict[str, tuple[list[int], str]] = {}

    def header(self, name: str) -> tuple[list[int], str]:
        if name not in self._headers:
            part = self._file.get_slice(name)
            self._headers[name] = part.get_shape(), part.get_dtype()
        return self._headers[name]

    def nbytes(self) -> int:
        """Of all tensors, of those dtypes that are known."""
        headers = map(self.header, self.places)
        known = [(shape, _DTYPES[dtype]) for shape, dtype in headers if dtype in _DTYPES]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in known)

    def whole(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def rows(self, name: str, first: int, last: int) -> Tensor:
        with torch.device("cpu"):  # the library makes slices on the default device
            tensor: Tensor = self._file.get_slice(name)[first:last]
        return tensor


class Shards:
    """Names, headers and tensors of a single file or of the files named by an index.

    Opening reads headers only, so files that do not fit each other are refused before anything is
    loaded. With a `prefix`, or several, only the files that have names with it are opened. Files
    are mapped, not read: what was touched of them stays in memory as long as nothing else needs it.

    `text_only`: of a model that sees the language model alone, by the names that it has alone.
    """

    def __init__(
        self, folder: Path, prefix: str | tuple[str, ...] = "", *, text_only: bool = False
    ) -> None:
        self.folder, self._text_only = folder, text_only
        self._opened = ExitStack()
        self._files: dict[str, _File] = {}
        self._file_of: dict[str, _File] = {}  # by the name of the tensor
        self._text = ""  # what the names of the language model begin with
        with ExitStack() as failed:
            failed.callback(self.__exit__)
            self._open_all(prefix)
            failed.pop_all()

    def _open_all(self, prefix: str | tuple[str, ...]) -> None:
        index, single = self.folder / INDEX_NAME, self.folder / SINGLE_NAME
        if index.exists():
            self._open_index(index, prefix)
        elif single.exists():
            file = self._open(SINGLE_NAME)
            self._text = self._text_of(file.places)
            self._file_of = dict.fromkeys(file.places, file)
        else:
            raise _error(
                "folder",
                f"{SINGLE_NAME} or {INDEX_NAME}",
                f"{self.folder} with neither",
                "pass the folder of a checkpoint",
            )

    def _open_index(self, index: Path, prefix: str | tuple[str, ...]) -> None:
        """Open the files of an index; each has to hold what the index says and nothing else."""
        weight_map, total = self._read_index(index)
        self._text = self._text_of(weight_map)
        start = (prefix,) if isinstance(prefix, str) else prefix
        start = tuple(self._text + each for each in start)
        wanted = {file for name, file in weight_map.items() if name.startswith(start)}
        for file in sorted(wanted):
            for name in self._open(file).places:
                said = weight_map.get(name)
                if said != file:
                    place = f"in {said}" if said else "in no file"
                    raise _error(
                        name, f"it {place}, as {index.name} says", f"it in {file}", "restore them"
                    )
        for name, file in weight_map.items():
            if file not in wanted:
                continue
            if name not in self._files[file].places:
                raise _error(
                    name,
                    f"it in {file}, as {index.name} says",
                    "a file without it",
                    "restore the file",
                )
            self._file_of[name] = self._files[file]
        if len(self._files) < len(set(weight_map.values())) or total is None:
            return
        held = sum(file.nbytes() for file in self._files.values())
        if total != held:
            warnings.warn(  # writers differ in what they count, and every tensor is checked anyway
                f"from_pretrained: {index}: expected a total_size of {held} bytes, got {total!r}; "
                "names, shapes and sizes of all tensors fit: loading goes on",
                stacklevel=7,  # the caller of from_pretrained
            )

    @staticmethod
    def _read_index(path: Path) -> tuple[dict[str, str], Any]:
        """weight_map and total_size, which may be absent."""
        try:
            index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
            weight_map = index["weight_map"]
            if not all(isinstance(v, str) and Path(v).name == v for v in weight_map.values()):
                raise TypeError("weight_map names no plain files")
            total = (index.get("metadata") or {}).get("total_size")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            came = f"{path} ({error})"
            raise _error("folder", "an index with a weight_map", came, "restore the file") from None
        return weight_map, total

    def _open(self, name: str) -> _File:
        self._files[name] = file = _File(self.folder / name, self._opened)
        return file

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _text_of(self, names: Iterable[str]) -> str:
        """What every name of the language model begins with; the rest must be what is left out."""
        if not self._text_only or not any(name.startswith(_TEXT) for name in names):
            return ""
        if unknown := [name for name in names if not name.startswith((_TEXT, *_VISION))]:
            raise _error(
                unknown[0],
                f"names that begin with {_TEXT} or, to be left out, {' or '.join(_VISION)}",
                "this one beside them",
                "nothing says whether the text needs it: restore the files",
            )
        return _TEXT

    def __contains__(self, name: str) -> bool:
        return self._text + name in self._file_of

    def names(self) -> Iterable[str]:
        """Of the language model."""
        of_text = (name for name in self._file_of if name.startswith(self._text))
        return [name.removeprefix(self._text) for name in of_text]

    def header(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors dtype (F32, BF16, F8_E4M3 ...)."""
        name = self._text + name
        return self._file_of[name].header(name)

    def place(self, name: str) -> tuple[Path, int]:
        """File and number in it: tensors in this order are read from the front to the back."""
        name = self._text + name
        file = self._file_of[name]
        return file.path, file.places[name]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        name = self._text + name
        return self._file_of[name].whole(name).clone()

    def slabs(self, name: str, step: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, a multiple of `step` rows or what is left), a few MiB at a time; they lie in
        the file."""
        shape, dtype = self.header(name)
        name = self._text + name
        file = self._file_of[name]
        if not math.prod(shape):
            return
        row = math.prod(shape[1:]) * _DTYPES[dtype].itemsize
        rows = min(max(step, _SLAB // row // step * step), shape[0])
        for first in range(0, shape[0], rows):
            yield first, file.rows(name, first, min(first + rows, shape[0]))
