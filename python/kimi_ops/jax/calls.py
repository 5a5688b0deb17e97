# SPDX-License-Identifier: MIT
"""Calls of the native module's XLA handlers (csrc/bindings/xla), which are registered here."""

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


def result(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def call(
    op: str,
    results: list[jax.ShapeDtypeStruct],
    *arguments: Any,
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> list[jax.Array]:
    """`op` on `arguments`, of which None stands for one that is not given.

    Shapes and dtypes are checked while the program is traced; the workspace is one more result,
    which XLA's own plan of memory holds, and the number of threads is that of the tracing thread.
    """
    arrays = [jnp.zeros(0, jnp.float32) if x is None else jnp.asarray(x) for x in arguments]
    attributes["threads"] = _C.num_threads()
    shapes = [[(x.shape, str(x.dtype)) for x in side] for side in (arrays, results)]
    devices = {False, *(d.platform == "gpu" for d in jax.devices())}
    needed = max(_C.xla_traced(op, cuda, *shapes, attributes) for cuda in devices)
    workspace = [result((needed,), jnp.uint8)] * (needed > 0)
    function = jax.ffi.ffi_call(
        PREFIX + op, results + workspace, vmap_method="sequential", input_output_aliases=aliases
    )
    return list(function(*arrays, **{k: _typed(v) for k, v in attributes.items()}))[: len(results)]


def _typed(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return np.array(value, np.float32)
    return np.float32(value) if isinstance(value, float) else np.int64(value)


def ids(array: Any) -> jax.Array:
    """Whole numbers as the kernels take them; no gradient passes, not even one of nothing."""
    return jax.lax.stop_gradient(jnp.asarray(array, jnp.int32))
