# SPDX-License-Identifier: MIT
"""The safetensors files of one checkpoint folder, read some rows of a tensor at a time."""

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_ops.models.kimi_k2.safetensors_file import SafetensorsFile, Stored, unique

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_SLAB = 2 << 20  # bytes that are read at once: they and what becomes of them stay in the cache

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


class Shards:
    """Names, headers and tensors of a single file or of the files named by an index.

    Opening reads headers only, so files that do not fit each other are refused before anything is
    loaded. With a `prefix` only the files that have names with it are opened.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}  # by the name of the tensor
        try:
            self._open_all(prefix)
        except BaseException:
            self.__exit__()
            raise

    def _open_all(self, prefix: str) -> None:
        index, single = self.folder / INDEX_NAME, self.folder / SINGLE_NAME
        if index.exists():
            self._open_index(index, prefix)
        elif single.exists():
            file = self._open(SINGLE_NAME)
            self._file_of = dict.fromkeys(file.tensors, file)
        else:
            raise _error(
                "folder",
                f"{SINGLE_NAME} or {INDEX_NAME}",
                f"{self.folder} with neither",
                "pass the folder of a checkpoint",
            )

    def _open_index(self, index: Path, prefix: str) -> None:
        """Open the files of an index; each has to hold what the index says and nothing else."""
        weight_map, total = self._read_index(index)
        wanted = {file for name, file in weight_map.items() if name.startswith(prefix)}
        for file in sorted(wanted):
            for name in self._open(file).tensors:
                said = weight_map.get(name)
                if said != file:
                    place = f"in {said}" if said else "in no file"
                    raise _error(
                        name, f"it {place}, as {index.name} says", f"it in {file}", "restore them"
                    )
        for name, file in weight_map.items():
            if file not in wanted:
                continue
            if name not in self._files[file].tensors:
                raise _error(
                    name,
                    f"it in {file}, as {index.name} says",
                    "a file without it",
                    "restore the file",
                )
            self._file_of[name] = self._files[file]
        held = sum(one.nbytes for file in self._files.values() for one in file.tensors.values())
        if not prefix and total is not None and total != held:
            warnings.warn(  # writers differ in what they count, and every tensor is checked anyway
                f"from_pretrained: {index}: expected a total_size of {held} bytes, got {total!r}; "
                "names, shapes and sizes of all tensors fit: loading goes on",
                stacklevel=6,  # the caller of from_pretrained
            )

    @staticmethod
    def _read_index(path: Path) -> tuple[dict[str, str], Any]:
        """weight_map and total_size, which may be absent."""
        try:
            index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
            weight_map = index["weight_map"]
            if not all(isinstance(v, str) and Path(v).name == v for v in weight_map.values()):
                raise TypeError("weight_map names no plain files")
            total = (index.get("metadata") or {}).get("total_size")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            came = f"{path} ({error})"
            raise _error("folder", "an index with a weight_map", came, "restore the file") from None
        return weight_map, total

    def _open(self, name: str) -> SafetensorsFile:
        self._files[name] = file = SafetensorsFile(self.folder / name)
        return file

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def header(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors dtype (F32, BF16, F8_E4M3 ...)."""
        stored = self._stored(name)
        return stored.shape, stored.dtype

    def place(self, name: str) -> tuple[Path, int]:
        """File and offset: tensors in this order are read from the front to the back."""
        return self._file_of[name].path, self._stored(name).begin

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        file, stored = self._file_of[name], self._stored(name)
        data = torch.empty(stored.nbytes, dtype=torch.uint8, device="cpu")
        file.read(stored.begin, data.numpy().data)
        return data.view(_DTYPES[stored.dtype]).view(stored.shape)

    def slabs(self, name: str, step: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, a multiple of `step` rows or what is left), a few MiB at a time.

        The memory is the next slab's, too.
        """
        file, (dtype, shape, begin, nbytes) = self._file_of[name], self._stored(name)
        if not nbytes:
            return
        row = nbytes // shape[0]
        rows = min(max(step, _SLAB // row // step * step), shape[0])
        buffer = torch.empty(rows * row, dtype=torch.uint8, device="cpu")
        for first in range(0, shape[0], rows):
            count = min(rows, shape[0] - first)
            part = buffer[: count * row]
            file.read(begin + first * row, part.numpy().data)
            yield first, part.view(_DTYPES[dtype]).view(count, *shape[1:])

    def _stored(self, name: str) -> Stored:
        return self._file_of[name].tensors[name]
