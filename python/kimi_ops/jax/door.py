# SPDX-License-Identifier: MIT
"""JAX's way to the kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_ops.activations import Activation
from kimi_ops.arrays.balance import Balance
from kimi_ops.arrays.door import Plan, name_of
from kimi_ops.arrays.experts import Experts
from kimi_ops.arrays.formats import Fp8BlockWeight, Int4GroupWeight
from kimi_ops.arrays.gate import Gates
from kimi_ops.arrays.optimizer import Optimizer
from kimi_ops.jax import passes, products, routing
from kimi_ops.jax.calls import on_gpu

_FUNCTIONS = {
    name: function
    for module in (routing, products, passes)
    for name, function in vars(module).items()
    if callable(function)
}


class Jax(Gates, Balance, Experts, Optimizer):
    """Arrays never change: what a native function writes to comes back as a new one."""

    autograd = True

    @property
    def on_gpu(self) -> bool:  # type: ignore[override]
        return on_gpu()

    def run(self, op: str, *arguments: Any) -> Any:
        given = [_adopted(argument) for argument in arguments]
        if op == "fused_experts_planned" and (given[7] is not None or given[8] is not None):
            return (_quantized_experts(*given),)
        return _FUNCTIONS[op](*given)

    def array(self, x: Any) -> Any:
        return _held(x)

    def space(self, x: Any) -> Any:
        return jnp

    def dtype(self, dtype: Any) -> Any:
        return name_of(dtype)

    def constant(self, x: Any) -> Any:
        return jax.lax.stop_gradient(x)

    def order(self, x: Any) -> Any:
        return jnp.argsort(x, stable=True)

    def sigmoid(self, x: Any) -> Any:
        return jax.nn.sigmoid(x)

    def softplus(self, x: Any) -> Any:
        return jax.nn.softplus(x)

    def erf(self, x: Any) -> Any:
        return jax.lax.erf(x)

    def writes(self, accumulate: bool) -> bool:
        return accumulate

    def fp8_product(self, a: Any, b: Any, offsets: Any, bias: Any, dtype: str) -> Any:
        ways = {"cpu": functools.partial(super().fp8_product, dtype=dtype)}
        if on_gpu():
            ways["cuda"] = functools.partial(products.fp8_product, dtype=dtype)
        return jax.lax.platform_dependent(a, b, offsets, bias, **ways)


def _adopted(value: Any) -> Any:
    if isinstance(value, list):
        return [_adopted(one) for one in value]
    plain = value is None or isinstance(value, (str, bool, int, float, tuple))
    if plain:
        return value
    array = _held(value)
    # of whole numbers not even a gradient of nothing passes
    whole = not jnp.issubdtype(array.dtype, jnp.floating)
    return jax.lax.stop_gradient(array) if whole else array


def _held(x: Any) -> Any:
    """`x` as an array of JAX, which drops the upper half of whole numbers of 64 bits in silence."""
    array = jnp.asarray(x)
    if isinstance(x, jax.Array) or not jnp.issubdtype(array.dtype, jnp.integer):
        return array
    given = np.asarray(x)
    if given.dtype != array.dtype and not np.array_equal(given, array):
        raise ValueError(
            f"kimi_ops.jax: expected whole numbers of {array.dtype}, got {given.min()} .. "
            f"{given.max()}; JAX holds more with jax_enable_x64 alone"
        )
    return array


OPS = Jax()


# ---- experts of quantised weights: their gradients are those of the composed form


@functools.partial(jax.custom_vjp, nondiff_argnums=(11, 12, 13, 14))
def _quantized_experts(*arguments: Any) -> Any:
    return products.compute(*(*arguments[:-1], False))[0]


def _composed(
    x: Any, up: Any, down: Any, weights: Any, row_map: Any, source: Any, offsets: Any,
    up_scale: Any, down_scale: Any, b_gate_up: Any, b_down: Any, *, form: Activation, first: bool,
) -> Any:  # fmt: skip
    plan = Plan(row_map, source, offsets, offsets)
    matrices = _stored(up, up_scale), _stored(down, down_scale)
    return OPS.composed(x, *matrices, weights, plan, b_gate_up, b_down, form, first)


def _stored(data: Any, scale: Any) -> Any:
    if scale is None:
        return data
    return (Int4GroupWeight if data.dtype == jnp.int32 else Fp8BlockWeight)(data, scale)


def _forward(*arguments: Any) -> Any:
    *arrays, name, numbers, first, _ = arguments
    form = Activation(name, numbers)
    return jax.vjp(functools.partial(_composed, form=form, first=first), *arrays)


_quantized_experts.defvjp(_forward, lambda *arguments: arguments[-2](arguments[-1]))
