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
    offsets = OPS.ids(jnp.cumsum(OPS.array(group_sizes)))
    return OPS.grouped_gemm(
        jnp.asarray(lhs), jnp.asarray(rhs), offsets, out_dtype=preferred_element_type
    )
