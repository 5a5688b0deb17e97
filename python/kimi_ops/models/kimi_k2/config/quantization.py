# SPDX-License-Identifier: MIT
"""The ``quantization_config`` of a checkpoint: which ways of storing matrices are understood.

``fp8`` and ``blockwise_int8`` have a scale for each block of ``weight_block_size``, or without it
one for each matrix or row. ``compressed-tensors`` is packed INT4 in groups of 32 (Kimi K2 Thinking)
or FP8 with a scale for each matrix or row. What the tensors themselves hold decides how they are
read (`stored`); what is said of them here must not contradict it.
"""

from collections.abc import Iterator
from typing import Any

from kimi_ops.formats import FP8_BLOCK, INT4_GROUP

__all__ = ["check_quantization", "fp8_block"]

_METHODS = ("fp8", "blockwise_int8", "compressed-tensors")
_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized")


def _error(field: str, expected: str, came: Any, mend: str) -> ValueError:
    where = ".".join(["quantization_config", *([field] if field else [])])
    return ValueError(f"KimiK2Config: {where}: expected {expected}, got {came!r}; {mend}")


def check_quantization(values: Any) -> None:
    """Raise a TypeError or ValueError that names what is not understood; None is not quantised."""
    if values is None:
        return
    if not isinstance(values, dict):
        raise TypeError(
            "KimiK2Config: quantization_config: expected a dict or null, got "
            f"{type(values).__name__}; pass the object that config.json holds"
        )
    method = values.get("quant_method")
    if method not in _METHODS:
        raise _error(
            "quant_method", f"one of {list(_METHODS)}", method, "dequantise the checkpoint first"
        )
    block = values.get("weight_block_size")
    if block is not None:
        sizes = block if isinstance(block, list | tuple) else ()
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise _error("weight_block_size", "two sizes, as [128, 128], or null", block, "fix it")
    fmt = values.get("fmt", "e4m3")
    if method == "fp8" and fmt not in ("e4m3", "float8_e4m3fn", None):
        raise _error("fmt", "e4m3", fmt, "no other is read")
    if method == "compressed-tensors":
        _check_compressed(values)


def _check_compressed(values: dict[str, Any]) -> None:
    form = values.get("format")
    if form not in _FORMATS:
        raise _error("format", f"one of {list(_FORMATS)}", form, "no other is read")
    for name, weights in _weights(values):
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        packed = form == "pack-quantized"
        if packed and (bits, kind) != (4, "int"):
            raise _error(f"{name}.weights", "4 bits, int", f"{bits} bits, {kind}", "fix it")
        if packed and weights.get("group_size", INT4_GROUP) != INT4_GROUP:
            raise _error(f"{name}.group_size", str(INT4_GROUP), weights["group_size"], "fix it")
        if weights.get("symmetric") is False:
            raise _error(f"{name}.symmetric", "true", False, "zero points are not read")
        if weights.get("actorder"):
            raise _error(f"{name}.actorder", "null", weights["actorder"], "no order is read")


def _weights(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    groups = values.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise _error("config_groups", "a dict", groups, "restore the file")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _error(f"config_groups.{name}.weights", "a dict", weights, "restore the file")
        yield f"config_groups.{name}", weights


def fp8_block(values: dict[str, Any] | None) -> tuple[int, int]:
    """Rows and columns that share a scale, where a scale is that of a block."""
    rows, columns = (values or {}).get("weight_block_size") or (FP8_BLOCK, FP8_BLOCK)
    return rows, columns
