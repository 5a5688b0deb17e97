# SPDX-License-Identifier: MIT
"""The safetensors files of one checkpoint folder, read one tensor at a time."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def _error(expected: str, came: str, mend: str) -> ValueError:
    return ValueError(f"from_pretrained: folder: expected {expected}, got {came}; {mend}")


class Shards:
    """Names, headers and tensors of a single file or of the files named by an index.

    Opening reads headers only, so a truncated file is refused before anything is loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}  # tensor name -> open file
        try:
            self._open_all()
        except BaseException:
            self._stack.close()
            raise

    def _open_all(self) -> None:
        index, single = self.folder / INDEX_NAME, self.folder / SINGLE_NAME
        if index.exists():
            weight_map = self._read_index(index)
            opened = {file: self._open(self.folder / file) for file in set(weight_map.values())}
            held = {file: set(handle.keys()) for file, handle in opened.items()}
            for name, file in weight_map.items():
                if name not in held[file]:
                    raise _error(
                        f"{name} in {file}, as {index.name} says",
                        "a file without it",
                        "restore the file",
                    )
                self._file_of[name] = opened[file]
        elif single.exists():
            opened_file = self._open(single)
            self._file_of = dict.fromkeys(opened_file.keys(), opened_file)
        else:
            raise _error(
                f"{SINGLE_NAME} or {INDEX_NAME}",
                f"{self.folder} with neither",
                "pass the folder of a checkpoint",
            )

    @staticmethod
    def _read_index(path: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not all(isinstance(v, str) and Path(v).name == v for v in weight_map.values()):
                raise TypeError("weight_map names no plain files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            came = f"{path} ({error})"
            raise _error("an index with a weight_map", came, "restore the file") from None
        return weight_map

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise _error(f"{path}", "no such file", "restore the file") from None
        except (SafetensorError, OSError) as error:
            came = f"{path}, truncated or of another kind ({error})"
            raise _error("a whole safetensors file", came, "restore it") from None

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def header(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors dtype (F32, BF16, F8_E4M3 ...)."""
        view = self._file_of[name].get_slice(name)
        return list(view.get_shape()), view.get_dtype()

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)
