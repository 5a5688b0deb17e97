# SPDX-License-Identifier: MIT
"""The forms in which a checkpoint stores a matrix, told by the tensors that are there.

    plain       X.weight in BF16, F16, F32 or F64, and nothing beside it
    fp8, int8   X.weight in F8_E4M3 or I8, times X.weight_scale_inv or X.weight_scale: a number for
                each block (`weight_block_size`), each row ([N], [N, 1]) or the matrix ([], [1])
    int4        X.weight_packed, X.weight_scale and (at will) X.weight_shape in its place

Scales are floats, or bytes of an exponent (UE8M0: 2^(byte - 127)). Whatever else stands there is
refused by name: read as something that it is not, it would give wrong logits without a word.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kimi_ops.formats import INT4_GROUP, INT4_WORD, dequantize_fp8, dequantize_int4
from kimi_ops.models.kimi_k2.checkpoint.shards import Shards

SCALES = ("weight_scale_inv", "weight_scale")
COMPANIONS = ("_scale_inv", "_packed", "_scale", "_shape")  # appended to the name of a matrix
_FLOATS = ("BF16", "F16", "F32")
_PLAIN = (*_FLOATS, "F64")
_SCALED = {"F8_E4M3": "fp8", "I8": "int8"}
_EXPONENTS = ("F8_E8M0", "U8")


def find(name: str, shards: Shards) -> str | None:
    """The form of a matrix, "plain" | "fp8" | "int8" | "int4"; None where it is missing."""
    if name in shards:
        return _SCALED.get(shards.header(name)[1], "plain")
    return "int4" if f"{name}_packed" in shards else None


def check(name: str, form: str, shape: list[int], shards: Shards, block: tuple[int, int]) -> None:
    """Refuse a matrix, or a tensor that belongs to it, of another shape or dtype."""
    beside = {suffix for suffix in COMPANIONS if f"{name}{suffix}" in shards}
    if form == "int4":
        _check_packed(name, shape, shards)
        beside -= {"_packed", "_scale", "_shape"}
    else:
        _check_shape(name, shape, shards, (*_PLAIN, *_SCALED))
    if form in _SCALED.values():
        scale = _scale_name(name, shards)
        _grid(scale, shape, shards, block)
        _check_shape(scale, shards.header(scale)[0], shards, (*_FLOATS, *_EXPONENTS))
        beside.discard(scale.removeprefix(name))
    if beside:
        stored = f"{shards.header(name)[1]} weights" if name in shards else "packed ones"
        raise ValueError(
            f"from_pretrained: {name}{min(beside)}: expected no such tensor beside {stored}, got "
            "one; nothing says what it does to them: restore the files"
        )


def read(
    name: str, form: str, shape: list[int], shards: Shards, block: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """(first row, some rows) of a tensor until all are read, fp32 where they were dequantised."""
    if form == "plain":
        yield from shards.slabs(name)
    elif form == "int4":
        scale = scales(f"{name}_scale", shards)
        for first, packed in shards.slabs(f"{name}_packed"):
            part = scale[first : first + len(packed)]
            yield first, dequantize_int4(packed, part)[:, : shape[1]]
    else:
        source = _scale_name(name, shards)
        grid, (height, width) = _grid(source, shape, shards, block)
        scale = scales(source, shards).view(grid)
        for first, weight in shards.slabs(name, 1 if len(scale) == 1 else height):
            part = scale[first // height : -(-(first + len(weight)) // height)]
            yield first, dequantize_fp8(weight, part, (min(height, len(weight)), width))


def scales(name: str, shards: Shards) -> Tensor:
    """The numbers of a scale tensor, fp32 where they are exponents."""
    values = shards.tensor(name)
    if shards.header(name)[1] not in _EXPONENTS:
        return values
    exponents = values.view(torch.uint8).int() - 127
    ones = torch.ones(exponents.shape, dtype=torch.float32, device="cpu")
    powers = torch.ldexp(ones, exponents)
    return powers.masked_fill(exponents == 128, torch.nan)


def in_blocks(name: str, shards: Shards, shape: list[int], block: tuple[int, int]) -> bool:
    """Whether a matrix with scales has one for each block, under the usual name."""
    scale = f"{name}_scale_inv"
    return scale in shards and shards.header(scale)[0] == _blocks(shape, block)


def _blocks(shape: list[int], block: tuple[int, int]) -> list[int]:
    return [-(-size // step) for size, step in zip(shape, block, strict=True)]


def _scale_name(name: str, shards: Shards) -> str:
    """The one tensor of scales beside a matrix."""
    there = [
        f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in shards
    ]
    if not there:
        raise ValueError(
            f"from_pretrained: {name}_scale_inv: expected scales beside {shards.header(name)[1]} "
            f"weights, got no such tensor; restore the files of {shards.folder}"
        )
    return there[0]


def _grid(
    scale: str, shape: list[int], shards: Shards, block: tuple[int, int]
) -> tuple[list[int], tuple[int, int]]:
    """(the shape of the scales as a matrix, the rows and columns that share one)."""
    came, (rows, columns) = shards.header(scale)[0], shape
    if came == _blocks(shape, block):
        return came, block
    if came in ([], [1], [1, 1]):
        return [1, 1], (rows, columns)
    if came in ([rows], [rows, 1]):
        return [rows, 1], (1, columns)
    raise ValueError(
        f"from_pretrained: {scale}: expected shape {_blocks(shape, block)} for blocks of "
        f"{list(block)}, [{rows}, 1] for rows or [1] for the matrix, got {came}; restore the file "
        "or correct weight_block_size"
    )


def _check_packed(name: str, shape: list[int], shards: Shards) -> None:
    rows, columns = shape
    _check_shape(f"{name}_packed", [rows, -(-columns // INT4_WORD)], shards, ("I32",))
    _check_shape(f"{name}_scale", [rows, -(-columns // INT4_GROUP)], shards, _FLOATS)
    if f"{name}_shape" in shards:
        _check_shape(f"{name}_shape", [2], shards, ("I64", "I32"))
        came = shards.tensor(f"{name}_shape").tolist()
        if came != shape:
            raise _wrong(f"{name}_shape", str(shape), str(came), shards.place(f"{name}_shape")[0])


def _check_shape(name: str, shape: list[int], shards: Shards, dtypes: tuple[str, ...]) -> None:
    if name not in shards:
        raise _wrong(name, f"shape {shape}", "no such tensor", shards.folder)
    path = shards.place(name)[0]
    came, dtype = shards.header(name)
    if came != shape:
        raise _wrong(name, f"shape {shape}", str(came), path)
    if dtype not in dtypes:
        raise ValueError(
            f"from_pretrained: {name}: expected {' or '.join(dtypes)}, got {dtype}; what that "
            f"stands for is not known here, convert {path}"
        )


def _wrong(name: str, expected: str, came: str, path: Path) -> ValueError:
    return ValueError(
        f"from_pretrained: {name}: expected {expected}, got {came} in {path}; it belongs to "
        "another config.json"
    )


def check_finite(name: str, first: int, value: Tensor, shards: Shards) -> None:
    """Refuse rows of a tensor, from number `first` on, with a NaN or an infinity among them."""
    if value.dtype == torch.float8_e4m3fn:
        finite = int((value.view(torch.uint8) & 0x7F).max()) < 0x7F
    elif value.is_floating_point():  # NaN pass through: thirty times as fast as isfinite().all()
        finite = all(map(math.isfinite, value.aminmax()))
    else:
        finite = True
    if finite:
        return
    place = (~value.float().isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"from_pretrained: {name}: expected finite values, got {float(value[tuple(place)])} in "
        f"{str(value.dtype).removeprefix('torch.')} at {[first + place[0], *place[1:]]}, from "
        f"{shards.place(name)[0]}; restore the file, or load it in a dtype that holds its values"
    )
