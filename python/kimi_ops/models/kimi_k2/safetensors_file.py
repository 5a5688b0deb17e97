# SPDX-License-Identifier: MIT
"""One safetensors file: a header that is believed only where it fits the file, then bytes.

    8 bytes     n, little endian
    n bytes     {"name": {"dtype": .., "shape": [..], "data_offsets": [begin, end]}, ..}, JSON
    the rest    the tensors' data, without holes; offsets count from here

Read with `pread` into memory of the caller's: a mapping would count as memory of the process as far
as it was touched, and a file cut meanwhile would kill it.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

_LONGEST = 100_000_000  # bytes of a header, by the format
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
_BITS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
_BITS |= dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


class Stored(NamedTuple):
    """What a header says of a tensor; `begin` counts from the start of the file."""

    dtype: str
    shape: list[int]
    begin: int
    nbytes: int


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; two values under one name are a ValueError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice")
    return values


class SafetensorsFile:
    """An open file, with `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            came = "no such file" if not path.exists() else "something else of that name"
            raise self._error("", "a file", came)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._error("", "a file to read", str(error)) from None
        try:
            self.tensors = self._header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def _error(self, name: str, expected: str, came: str) -> ValueError:
        where = (
            f"{name}: expected {expected} in {self.path}"
            if name
            else (f"folder: expected {self.path} as {expected}")
        )
        return ValueError(f"from_pretrained: {where}, got {came}; restore the file")

    def read(self, begin: int, memory: memoryview) -> None:
        """Fill `memory`, of bytes, with those from `begin` on."""
        done = 0
        while done < len(memory):
            count = os.preadv(self._descriptor, [memory[done:]], begin + done)
            if count == 0:
                raise self._error("", "a whole file", "its end, since it was cut meanwhile")
            done += count

    def _header(self) -> dict[str, Stored]:
        size = os.fstat(self._descriptor).st_size
        prefix = bytearray(8)
        if size < 8:
            raise self._error("", "a whole safetensors file", f"a truncated one of {size} bytes")
        self.read(0, memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, _LONGEST):
            raise self._error(
                "",
                "a whole safetensors file",
                f"{length} bytes of header in {size}: truncated or of another kind",
            )
        text = bytearray(length)
        self.read(8, memoryview(text))
        try:
            values = json.loads(text.decode(), object_pairs_hook=unique)
            if not isinstance(values, dict):
                raise ValueError(f"a {type(values).__name__}")
        except (ValueError, RecursionError) as error:
            raise self._error("", "a safetensors file", f"no header ({error})") from None
        values.pop("__metadata__", None)
        tensors = {name: self._stored(name, value, 8 + length) for name, value in values.items()}
        self._check_places(tensors, 8 + length, size)
        return tensors

    def _stored(self, name: str, value: Any, start: int) -> Stored:
        """What the header says of one tensor, where that can be."""
        if not isinstance(value, dict):
            raise self._error(name, "dtype, shape and data_offsets", repr(value))
        dtype, shape, place = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._error(name, f"one of {', '.join(_BITS)}", f"dtype {dtype!r}")
        if not _counts(shape):
            raise self._error(name, "a shape of sizes", repr(shape))
        if not _counts(place) or len(place) != 2:
            raise self._error(name, "data_offsets of a begin and an end", repr(place))
        bits, (begin, end) = _BITS[dtype] * math.prod(shape), place
        if bits % 8 or end - begin != bits // 8:
            raise self._error(
                name,
                f"{bits / 8:.15g} bytes for {dtype} of shape {shape}",
                f"{end - begin} by data_offsets {place}",
            )
        return Stored(dtype, shape, start + begin, end - begin)

    def _check_places(self, tensors: dict[str, Stored], start: int, size: int) -> None:
        """Refuse tensors that share bytes, bytes without a tensor, and a file of another size."""
        last, end = "the header", start
        for name, (_, _, begin, nbytes) in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if begin != end:
                raise self._error(
                    name, f"data at offset {end - start}, where {last} ends", f"{begin - start}"
                )
            last, end = name, begin + nbytes
        if end != size:
            came = f"{size}, truncated" if size < end else str(size)
            raise self._error("", f"a file of {end} bytes, where {last} ends", came)


def _counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
