# SPDX-License-Identifier: MIT
"""Calls of the native module's XLA handlers (csrc/bindings/xla), which are registered here."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_ops._library import _C

PREFIX = "kimi_ops."


def _register() -> None:
    for name, handler in _C.xla_handlers(False).items():
        jax.ffi.register_ffi_target(PREFIX + name, handler, platform="cpu")
    if _C.cuda_architectures():
        for name, handler in _C.xla_handlers(True).items():
            jax.ffi.register_ffi_target(PREFIX + name, handler, platform="CUDA")


_register()


def on_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def result(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def like(x: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return result(x.shape, dtype or x.dtype)


def call(
    op: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *arguments: Any,
    aliases: dict[int, int] | None = None,
    cuda: bool | None = None,
    **attributes: Any,
) -> list[jax.Array]:
    """`op` on `arguments`, of which None stands for one that is not given; lists of them count one
    by one. `aliases` are arguments whose memory results take.

    Shapes and dtypes are checked while the program is traced, for the devices there are or for the
    kind that `cuda` names; the workspace is one more result, which XLA's own plan of memory holds,
    and the number of threads is that of the tracing thread.
    """
    arrays = [jnp.zeros(0, jnp.float32) if x is None else jnp.asarray(x) for x in _flat(arguments)]
    kept = {key: value for key, value in attributes.items() if value != []}
    kept["threads"] = _C.num_threads()
    shapes = [[(x.shape, str(x.dtype)) for x in side] for side in (arrays, results)]
    kinds = {False, on_gpu()} if cuda is None else {cuda}
    needed = max(_C.xla_traced(op, kind, *shapes, kept) for kind in kinds)
    workspace = [result((needed,), jnp.uint8)] * (needed > 0)
    function = jax.ffi.ffi_call(
        PREFIX + op,
        [*results, *workspace],
        vmap_method="sequential",
        input_output_aliases=aliases,
    )
    return list(function(*arrays, **{k: _typed(v) for k, v in kept.items()}))[: len(results)]


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [x for one in arguments for x in (one if isinstance(one, list) else [one])]


def _typed(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return np.array(value, np.float64)
    return np.float64(value) if isinstance(value, float) else np.int64(value)
