# SPDX-License-Identifier: MIT
"""The router's ops, and rows to their experts and back, with their gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kimi_ops.jax.calls import call, ids, result

F32, I32 = jnp.float32, jnp.int32


class Gate(NamedTuple):
    """weights [T, K] float32, indices [T, K] int32, tokens_per_expert [E] int32."""

    weights: jax.Array
    indices: jax.Array
    tokens_per_expert: jax.Array


class Plan(NamedTuple):
    """row_map [T, K], source [R], offsets [E], tokens_per_expert [E]; all int32."""

    row_map: jax.Array
    source: jax.Array
    offsets: jax.Array
    tokens_per_expert: jax.Array


def topk_gate(
    logits: Any,
    k: int,
    *,
    score_function: str = "sigmoid",
    expert_bias: Any = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score_topk: int = 2,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    valid: Any = None,
) -> Gate:
    """`kimi_ops.topk_gate` in JAX; the gradient goes from the weights to the logits."""
    options = (
        k, score_function, num_groups, topk_groups, group_score_topk, bool(renormalize),
        float(scaling_factor),
    )  # fmt: skip
    return _gate(*options)(jnp.asarray(logits), expert_bias, valid)


@functools.cache
def _gate(
    k: int,
    score_function: str,
    num_groups: int,
    topk_groups: int,
    group_score_topk: int,
    renormalize: bool,
    scaling_factor: float,
) -> Callable[..., Gate]:
    weighting: dict[str, Any] = {
        "score_function": score_function, "renormalize": renormalize,
        "scaling_factor": scaling_factor,
    }  # fmt: skip

    @jax.custom_vjp
    def gate(logits: jax.Array, expert_bias: Any, valid: Any) -> Gate:
        tokens, experts = _matrix("topk_gate", "logits", logits)
        pairs = result((tokens, k), F32), result((tokens, k), I32)
        return Gate(
            *call(
                "topk_gate", [*pairs, result((experts,), I32)], logits, expert_bias, valid, k=k,
                num_groups=num_groups, topk_groups=topk_groups, group_score_topk=group_score_topk,
                **weighting,
            )
        )  # fmt: skip

    def forward(logits: jax.Array, expert_bias: Any, valid: Any) -> tuple[Gate, Any]:
        found = gate(logits, expert_bias, valid)
        return found, (logits, found.indices)

    def backward(kept: Any, grads: Gate) -> tuple[Any, ...]:
        logits, indices = kept
        like = [result(logits.shape, logits.dtype)]
        (grad,) = call("topk_gate_backward", like, grads.weights, logits, indices, **weighting)
        return grad, None, None

    gate.defvjp(forward, backward)
    return gate


def _matrix(op: str, name: str, x: jax.Array) -> tuple[int, int]:
    if x.ndim != 2:
        raise ValueError(f"{op}: {name}: expected 2 dimensions, got {x.ndim}; reshape it")
    return x.shape[0], x.shape[1]


def update_expert_bias(
    bias: Any, tokens_per_expert: Any, rate: float, centered: bool = False
) -> jax.Array:
    """The bias [E] after the rule of `kimi_ops.update_expert_bias_`."""
    bias = jnp.asarray(bias)
    (updated,) = call(
        "update_expert_bias", [result(bias.shape, F32)], bias, tokens_per_expert,
        aliases={0: 0}, rate=float(rate), centered=bool(centered),
    )  # fmt: skip
    return updated


def sequence_balance_loss(
    logits: Any,
    indices: Any,
    *,
    num_sequences: int = 1,
    score_function: str = "sigmoid",
    coefficient: float = 1.0,
) -> jax.Array:
    """`kimi_ops.sequence_balance_loss` in JAX; the gradient goes to the logits."""
    loss = _balance_loss(num_sequences, score_function, float(coefficient))
    return loss(jnp.asarray(logits), ids(indices))


@functools.cache
def _balance_loss(
    num_sequences: int, score_function: str, coefficient: float
) -> Callable[..., Any]:
    options: dict[str, Any] = {"score_function": score_function, "coefficient": coefficient}

    def both(logits: jax.Array, indices: jax.Array) -> Any:
        _, experts = _matrix("sequence_balance_loss", "logits", logits)
        counts = result((num_sequences, experts), I32), result((num_sequences,), I32)
        return call(
            "sequence_balance_loss", [result((), F32), *counts], logits, indices,
            num_sequences=num_sequences, **options,
        )  # fmt: skip

    @jax.custom_vjp
    def loss(logits: jax.Array, indices: jax.Array) -> jax.Array:
        return both(logits, indices)[0]

    def forward(logits: jax.Array, indices: jax.Array) -> tuple[jax.Array, Any]:
        value, *counts = both(logits, indices)
        return value, (logits, *counts, indices.shape[1])

    def backward(kept: Any, grad: jax.Array) -> tuple[Any, ...]:
        logits, *counts, k = kept
        like = [result(logits.shape, logits.dtype)]
        (dlogits,) = call(
            "sequence_balance_loss_backward", like, grad, logits, *counts, k=int(k), **options
        )
        return dlogits, None

    loss.defvjp(forward, backward)
    return loss


def z_loss(logits: Any, *, coefficient: float = 1.0, valid: Any = None) -> jax.Array:
    """`kimi_ops.z_loss` in JAX; the gradient goes to the logits."""
    return _z_loss(float(coefficient))(jnp.asarray(logits), valid)


@functools.cache
def _z_loss(coefficient: float) -> Callable[..., Any]:
    def all_of(logits: jax.Array, valid: Any) -> Any:
        tokens, _ = _matrix("z_loss", "logits", logits)
        like = [result((), F32), result((tokens,), F32), result((), I32)]
        return call("z_loss", like, logits, valid, coefficient=coefficient)

    @jax.custom_vjp
    def loss(logits: jax.Array, valid: Any) -> jax.Array:
        return all_of(logits, valid)[0]

    def forward(logits: jax.Array, valid: Any) -> tuple[jax.Array, Any]:
        value, *kept = all_of(logits, valid)
        return value, (logits, *kept)

    def backward(kept: Any, grad: jax.Array) -> tuple[Any, ...]:
        like = [result(kept[0].shape, kept[0].dtype)]
        (dlogits,) = call("z_loss_backward", like, grad, *kept, coefficient=coefficient)
        return dlogits, None

    loss.defvjp(forward, backward)
    return loss


def permute_plan(indices: Any, num_experts: int, *, align: int = 1) -> Plan:
    """`kimi_ops.permute_plan` in JAX: R = T K + E (align - 1) rows, a number of the shapes."""
    indices = ids(indices)
    tokens, k = _matrix("permute_plan", "indices", indices)
    rows = tokens * k + num_experts * (align - 1)
    shapes = (tokens, k), (rows,), (num_experts,), (num_experts,)
    like = [result(shape, I32) for shape in shapes]
    return Plan(*call("permute_plan", like, indices, num_experts=num_experts, align=align))


@jax.custom_vjp
def permute(x: jax.Array, plan: Plan) -> jax.Array:
    """Rows [R, H] grouped by expert, of tokens x [T, H]."""
    like = [result((plan.source.shape[0], x.shape[1]), x.dtype)]
    return call("permute", like, x, plan.row_map, plan.source)[0]


@jax.custom_vjp
def _unpermute(y: jax.Array, plan: Plan, weights: Any) -> jax.Array:
    like = [result((plan.row_map.shape[0], y.shape[1]), y.dtype)]
    return call("unpermute", like, y, plan.row_map, weights)[0]


def _unpermute_backward(kept: Any, grad: jax.Array) -> tuple[Any, ...]:
    y, plan, weights = kept
    factors = jnp.ones(plan.row_map.shape, F32) if weights is None else weights
    like = [result(y.shape, y.dtype), result(factors.shape, F32)]
    dy, dweights = call("unpermute_backward", like, grad, y, plan.row_map, plan.source, factors)
    return dy, None, None if weights is None else dweights


_unpermute.defvjp(
    lambda y, plan, weights: (_unpermute(y, plan, weights), (y, plan, weights)), _unpermute_backward
)


permute.defvjp(
    lambda x, plan: (permute(x, plan), plan),
    lambda plan, grad: (_unpermute(grad, plan, None), None),
)


def unpermute(y: Any, plan: Plan, weights: Any = None) -> jax.Array:
    """Tokens [T, H]: the sums of their rows y [R, H] times `weights` [T, K]; to both goes a
    gradient."""
    y = jnp.asarray(y)
    return _unpermute(y, plan, None if weights is None else jnp.asarray(weights, F32))


def sort_chunks(x: Any, split_sizes: Any, order: Any, *, inverse: bool = False) -> jax.Array:
    """`kimi_ops.sort_chunks` in JAX; `inverse` undoes it, and is its gradient."""
    return _sort_chunks(jnp.asarray(x), ids(split_sizes), ids(order), bool(inverse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sort_chunks(x: jax.Array, sizes: jax.Array, order: jax.Array, inverse: bool) -> jax.Array:
    return call("sort_chunks", [result(x.shape, x.dtype)], x, sizes, order, inverse=inverse)[0]


_sort_chunks.defvjp(
    lambda x, sizes, order, inverse: (_sort_chunks(x, sizes, order, inverse), (sizes, order)),
    lambda inverse, kept, grad: (_sort_chunks(grad, *kept, not inverse), None, None),
)
