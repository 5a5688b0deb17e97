# SPDX-License-Identifier: MIT
"""``jax.lax.ragged_dot`` by the kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from kimi_ops.jax.door import OPS


def ragged_dot(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: Any = None,
) -> jax.Array:
    """``jax.lax.ragged_dot`` by `grouped_gemm`: lhs [R, K], rhs [E, K, N], group_sizes [E].

    Sums are float32 whatever `precision` says. `group_offset` has no counterpart and is refused.
    """
    if group_offset is not None:
        raise ValueError("ragged_dot: group_offset: expected None, got an offset; slice rhs")
    sizes = OPS.array(group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(
            f"ragged_dot: group_sizes: expected whole numbers, got {sizes.dtype}; cast them"
        )
    wide = sizes.dtype if sizes.dtype.itemsize == 8 else jnp.int32
    offsets = OPS.ids(jnp.cumsum(sizes, dtype=wide))
    return OPS.grouped_gemm(
        jnp.asarray(lhs), jnp.asarray(rhs), offsets, out_dtype=preferred_element_type
    )
