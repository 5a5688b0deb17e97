# SPDX-License-Identifier: MIT
"""The forms in which a checkpoint stores a matrix: plain, FP8 with block scales, packed INT4.

A matrix ``X.weight`` is FP8 where it is float8 (with ``X.weight_scale_inv`` beside it) and INT4
where ``X.weight_packed``, ``X.weight_scale`` and ``X.weight_shape`` stand in its place.
"""

from pathlib import Path

from torch import Tensor

from kimi_ops.formats import INT4_GROUP, INT4_WORD, dequantize_fp8, dequantize_int4
from kimi_ops.models.kimi_k2.shards import Shards

COMPANIONS = ("_scale_inv", "_packed", "_scale", "_shape")  # appended to the name of a matrix
_FLOATS = ("BF16", "F16", "F32")


def find(name: str, shards: Shards) -> str | None:
    """The form of a matrix, "plain" | "fp8" | "int4"; None where it is missing."""
    if name in shards:
        return "fp8" if shards.header(name)[1] == "F8_E4M3" else "plain"
    return "int4" if f"{name}_packed" in shards else None


def check(name: str, form: str, shape: list[int], shards: Shards, block: tuple[int, int]) -> None:
    """Refuse a matrix, or a tensor that belongs to it, of another shape than the model's."""
    if form == "int4":
        rows, columns = shape
        _check_shape(f"{name}_packed", [rows, -(-columns // INT4_WORD)], shards, ("I32",))
        _check_shape(f"{name}_scale", [rows, -(-columns // INT4_GROUP)], shards, _FLOATS)
        if f"{name}_shape" in shards:
            came = shards.tensor(f"{name}_shape").tolist()
            if came != shape:
                raise _wrong(f"{name}_shape", str(shape), str(came), shards.folder)
        return
    _check_shape(name, shape, shards)
    if form == "fp8":
        scale = f"{name}_scale_inv"
        grid = [-(-size // step) for size, step in zip(shape, block, strict=True)]
        if scale not in shards or shards.header(scale)[0] != grid:
            found = shards.header(scale)[0] if scale in shards else "no such tensor"
            raise ValueError(
                f"from_pretrained: {scale}: expected shape {grid} beside an FP8 weight, got "
                f"{found}; restore the file or correct weight_block_size"
            )


def read(name: str, form: str, shape: list[int], shards: Shards, block: tuple[int, int]) -> Tensor:
    """The matrix, dequantised to fp32 where it is not plain."""
    if form == "fp8":
        return dequantize_fp8(shards.tensor(name), shards.tensor(f"{name}_scale_inv"), block)
    if form == "int4":
        packed, scale = shards.tensor(f"{name}_packed"), shards.tensor(f"{name}_scale")
        return dequantize_int4(packed, scale)[:, : shape[1]]
    return shards.tensor(name)


def _check_shape(
    name: str, shape: list[int], shards: Shards, dtypes: tuple[str, ...] | None = None
) -> None:
    if name not in shards:
        raise _wrong(name, f"shape {shape}", "no such tensor", shards.folder)
    came, dtype = shards.header(name)
    if came != shape:
        raise _wrong(name, f"shape {shape}", str(came), shards.folder)
    if dtypes is not None and dtype not in dtypes:
        raise _wrong(name, " or ".join(dtypes), dtype, shards.folder)


def _wrong(name: str, expected: str, came: str, folder: Path) -> ValueError:
    return ValueError(
        f"from_pretrained: {name}: expected {expected}, got {came}; {folder} belongs to another "
        "config.json"
    )
