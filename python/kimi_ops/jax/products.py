# SPDX-License-Identifier: MIT
"""Products by experts' weights with their gradients, and what the optimizer multiplies."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kimi_ops.jax.calls import call, ids, result
from kimi_ops.jax.routing import F32, Plan, permute_plan

_QUINTIC = (3.4445, -4.7750, 2.0315)


def grouped_gemm(
    a: Any, b: Any, offsets: Any, *, bias: Any = None, out_dtype: Any = None
) -> jax.Array:
    """`kimi_ops.grouped_gemm`: a [R, K] by b [E, K, N], rows up to offsets [E] for each expert.
    Gradients go to a, b and the bias."""
    return _product(jnp.asarray(a), jnp.asarray(b), ids(offsets), bias, out_dtype, False)


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
    offsets = jnp.cumsum(ids(group_sizes), dtype=jnp.int32)
    return grouped_gemm(lhs, rhs, offsets, out_dtype=preferred_element_type)


def _product(
    a: jax.Array, b: jax.Array, offsets: jax.Array, bias: Any, out_dtype: Any, b_is_nk: bool
) -> jax.Array:
    for name, x, ndim in (("a", a, 2), ("b", b, 3)):
        if x.ndim != ndim:
            raise ValueError(f"grouped_gemm: {name}: expected {ndim} dimensions, got {x.ndim}")
    dtype = jnp.dtype(a.dtype if out_dtype is None else out_dtype)
    return _multiply(dtype.name, b_is_nk)(a, b, offsets, bias)


@functools.cache
def _multiply(out_dtype: str, b_is_nk: bool) -> Callable[..., jax.Array]:
    @jax.custom_vjp
    def multiply(a: jax.Array, b: jax.Array, offsets: jax.Array, bias: Any) -> jax.Array:
        like = [result((a.shape[0], b.shape[1 if b_is_nk else 2]), out_dtype)]
        return call("grouped_gemm", like, a, b, offsets, bias, b_is_nk=b_is_nk)[0]

    def forward(a: jax.Array, b: jax.Array, offsets: jax.Array, bias: Any) -> Any:
        return multiply(a, b, offsets, bias), (a, b, offsets, bias)

    def backward(kept: Any, grad: jax.Array) -> tuple[Any, ...]:
        a, b, offsets, bias = kept
        grad = grad.astype(a.dtype)
        da = _product(grad, b, offsets, None, None, not b_is_nk)
        db = _wgrad(grad, a, offsets) if b_is_nk else _wgrad(a, grad, offsets)
        if bias is None:
            return da, db, None, None
        ones = jnp.ones((a.shape[0], 1), a.dtype)
        return da, db, None, _wgrad(ones, grad, offsets)[:, 0]

    multiply.defvjp(forward, backward)
    return multiply


def _wgrad(a: jax.Array, dc: jax.Array, offsets: jax.Array, out_dtype: Any = None) -> jax.Array:
    shape = (offsets.shape[0], a.shape[1], dc.shape[1])
    return call("grouped_gemm_wgrad", [result(shape, out_dtype or a.dtype)], a, dc, offsets)[0]


def grouped_gemm_wgrad(a: Any, dc: Any, offsets: Any, *, out_dtype: Any = None) -> jax.Array:
    """`kimi_ops.grouped_gemm_wgrad`: [E, K, N]. Not differentiable."""
    return _wgrad(jnp.asarray(a), jnp.asarray(dc), ids(offsets), out_dtype)


def fused_experts(
    x: Any, w_gate_up: Any, w_down: Any, weights: Any, indices: Any, *, activation: str = "silu"
) -> jax.Array:
    """`kimi_ops.fused_experts` in JAX: x [T, H], w_gate_up [E, 2F, H], w_down [E, H, F]. Gradients
    go to all four."""
    plan = permute_plan(indices, jnp.shape(w_gate_up)[0])
    arrays = jnp.asarray(x), jnp.asarray(w_gate_up), jnp.asarray(w_down), jnp.asarray(weights, F32)
    return _experts(activation)(*arrays, plan)


@functools.cache
def _experts(activation: str) -> Callable[..., jax.Array]:
    def compute(save: bool, x: Any, up: Any, down: Any, weights: Any, plan: Plan) -> Any:
        rows = plan.source.shape[0] if save else 0
        like = [result(x.shape, x.dtype), result((rows, up.shape[1]), x.dtype)]
        arrays = x, up, down, weights, plan.row_map, plan.source, plan.offsets
        return call("fused_experts", like, *arrays, activation=activation)

    @jax.custom_vjp
    def experts(x: Any, up: Any, down: Any, weights: Any, plan: Plan) -> jax.Array:
        return compute(False, x, up, down, weights, plan)[0]

    def forward(*arguments: Any) -> tuple[jax.Array, Any]:
        y, gate_up = compute(True, *arguments)
        return y, (*arguments, gate_up)

    def backward(kept: Any, dy: jax.Array) -> tuple[Any, ...]:
        x, up, down, weights, plan, gate_up = kept
        like = [result(value.shape, value.dtype) for value in (x, up, down, weights)]
        arrays = x, up, down, weights, plan.row_map, plan.source, plan.offsets, gate_up
        grads = call("fused_experts_backward", like, dy, *arrays, activation=activation)
        return (*grads, None)

    experts.defvjp(forward, backward)
    return experts


def newton_schulz(
    g: Any,
    *,
    steps: int = 5,
    coefficients: Sequence[float] = _QUINTIC,
    method: str = "symmetric",
    dtype: Any = None,
    eps: float = 1e-7,
) -> jax.Array:
    """Matrices of one shape, [..., M, N], with singular values near 1. Not differentiable.

    The three coefficients hold for every step; `kimi_ops.newton_schulz` has named schedules.
    """
    if len(coefficients) != 3:
        raise ValueError(
            f"newton_schulz: coefficients: expected 3 numbers, got {len(coefficients)}"
        )
    g = jnp.asarray(g)
    stack = g.reshape(-1, *g.shape[-2:])
    (x,) = call(
        "newton_schulz", [result(stack.shape, g.dtype)], stack, method=method, eps=float(eps),
        dtype=jnp.dtype(g.dtype if dtype is None else dtype).name,
        coefficients=[float(c) for c in coefficients] * steps,
    )  # fmt: skip
    return x.reshape(g.shape)


def attention_max_logits(q: Any, k: Any, scale: float, *, causal: bool = True) -> jax.Array:
    """`kimi_ops.attention_max_logits`: [heads] float32 of q, k [B, heads, S, D]. Not
    differentiable."""
    q = jnp.asarray(q)
    like = [result((q.shape[1],), F32)]
    return call("attention_max_logits", like, q, k, scale=float(scale), causal=bool(causal))[0]
