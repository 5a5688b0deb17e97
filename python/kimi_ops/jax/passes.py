# SPDX-License-Identifier: MIT
"""The passes of MuonClip as custom calls: each returns new arrays in place of those that the native
function changes. float64, which JAX has only where it is asked for, crosses as its bits."""

from typing import Any

import jax
import jax.numpy as jnp

from kimi_ops.jax.calls import call, like, result
from kimi_ops.jax.routing import F32


def _bits(x: Any) -> Any:
    """float64 of a float32 number, as uint32 [2], lower half first; a subnormal one is 0."""
    if x is None:
        return None
    raw = jax.lax.bitcast_convert_type(jnp.asarray(x, F32).reshape(()), jnp.uint32)
    exponent, mantissa = (raw >> 23) & 0xFF, raw & 0x7FFFFF
    wide = jnp.where(exponent == 255, 2047, exponent + (1023 - 127))
    high = (raw >> 31 << 31) | (wide << 20) | (mantissa >> 3)
    return jnp.stack([(mantissa & 7) << 29, high]) * (exponent > 0)


def clip_rows_(
    weights: list[Any], max_logits: Any, layers: list[int], geometry: list[int],
    powers: list[float], tau: float,
) -> Any:  # fmt: skip
    gamma, *clipped = call(
        "clip_rows", [like(max_logits, F32), *map(like, weights)], max_logits, weights,
        aliases={i + 1: i + 1 for i in range(len(weights))}, count=len(weights), layers=layers,
        geometry=geometry, powers=powers, tau=tau,
    )  # fmt: skip
    return gamma, clipped


def muon_momentum_(
    grads: list[Any], buffers: list[Any], momentum: float, nesterov: bool, maximize: bool,
    squares: Any, pieces: list[int],
) -> Any:  # fmt: skip
    count = len(grads)
    found = call(
        "muon_momentum", [*(like(g, F32) for g in grads), *map(like, buffers)], grads, buffers,
        squares, aliases={count + i: count + i for i in range(count)}, count=count, pieces=pieces,
        momentum=momentum, nesterov=nesterov, maximize=maximize,
    )  # fmt: skip
    return found[:count], found[count:]


def muon_update_(
    params: list[Any], directions: list[Any], rates: list[float], decay: float, cautious: bool,
    squares: Any, pieces: list[int], lr: Any, weight_decay: Any,
) -> Any:  # fmt: skip
    return call(
        "muon_update", list(map(like, params)), params, directions, squares, _bits(lr),
        _bits(weight_decay), aliases={i: i for i in range(len(params))}, count=len(params),
        rates=rates, pieces=pieces, decay=decay, cautious=cautious,
    )  # fmt: skip


def adamw_(
    params: list[Any], grads: list[Any], exp_avgs: list[Any], exp_avg_sqs: list[Any],
    steps: list[Any], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    maximize: bool, cautious: bool, squares: Any, pieces: list[int], measure: bool, scale: Any,
    lr_factor: Any, weight_decay_factor: Any,
) -> Any:  # fmt: skip
    count = len(params)
    changed = [*params, *exp_avgs, *exp_avg_sqs, *steps]
    places = [*range(count), *range(2 * count, 5 * count)]  # gradients stay
    if measure and squares is not None:
        changed.append(squares)
        places.append(5 * count)
    found = call(
        "adamw", list(map(like, changed)), params, grads, exp_avgs, exp_avg_sqs, steps, squares,
        scale, _bits(lr_factor), _bits(weight_decay_factor),
        aliases={place: i for i, place in enumerate(places)}, count=count, lr=lr, beta1=beta1,
        beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize, cautious=cautious,
        pieces=pieces, measure=measure,
    )  # fmt: skip
    lists = [found[i * count : (i + 1) * count] for i in range(4)]
    return (*lists, *found[4 * count :])


def squares_(squares: Any, x: list[Any], pieces: list[int], lengths: list[int]) -> Any:
    return call(
        "squares", [like(squares)], squares, x, aliases={0: 0}, count=len(x), pieces=pieces,
        lengths=lengths,
    )[0]  # fmt: skip


def clip_factor(squares: Any, pieces: list[int], max_norm: float) -> Any:
    count = len(pieces) // 2
    results = [result((), F32)]
    return call("clip_factor", results, squares, count=count, pieces=pieces, max_norm=max_norm)[0]
