# SPDX-License-Identifier: MIT
"""Native functions that multiply, as custom calls with their gradients: arguments as in
csrc/bindings, dtypes by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kimi_ops.arrays.formats import Fp8BlockWeight, Int4GroupWeight, named
from kimi_ops.jax.calls import call, like, result
from kimi_ops.jax.routing import F32


def _multiply(
    a: Any, b: Any, offsets: Any, bias: Any, dtype: str, starts: Any, b_is_nk: bool,
    scale: Any = None, out: Any = None,
) -> Any:  # fmt: skip
    """`b_is_nk`: b is [E, N, K]. The result is added to `out` where there is one."""
    for name, x, ndim in (("a", a, 2), ("b", b, 3)):
        if x.ndim != ndim:
            raise ValueError(f"grouped_gemm: {name}: expected {ndim} dimensions, got {x.ndim}")
    arguments = [a, b, scale, offsets, bias, starts]
    results = [result((a.shape[0], b.shape[1 if b_is_nk else 2]), named(dtype))]
    options: dict[str, Any] = {"b_is_nk": b_is_nk, "accumulate": out is not None}
    if out is not None:
        arguments.append(out)
        options["aliases"] = {len(arguments) - 1: 0}
    return call("grouped_gemm", results, *arguments, **options)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 6))
def _grouped_gemm(
    a: Any, b: Any, offsets: Any, bias: Any, dtype: str, starts: Any, b_is_nk: bool
) -> Any:
    return _multiply(a, b, offsets, bias, dtype, starts, b_is_nk)


def _forward(
    a: Any, b: Any, offsets: Any, bias: Any, dtype: str, starts: Any, b_is_nk: bool
) -> Any:
    c = _grouped_gemm(a, b, offsets, bias, dtype, starts, b_is_nk)
    return c, (a, b, offsets, bias, starts)


def _backward(dtype: str, b_is_nk: bool, kept: Any, grad: Any) -> Any:
    a, b, offsets, bias, starts = kept
    name, grad = a.dtype.name, grad.astype(a.dtype)
    da = _grouped_gemm(grad, b, offsets, None, name, starts, not b_is_nk)
    pair = (grad, a) if b_is_nk else (a, grad)
    db = grouped_gemm_wgrad(*pair, offsets, name, starts)
    return da, db, None, _bias_gradient(bias, grad, offsets, starts), None


def _bias_gradient(bias: Any, grad: Any, offsets: Any, starts: Any) -> Any:
    if bias is None:
        return None
    ones = jnp.ones((grad.shape[0], 1), grad.dtype)
    return grouped_gemm_wgrad(ones, grad, offsets, grad.dtype.name, starts)[:, 0]


_grouped_gemm.defvjp(_forward, _backward)


def grouped_gemm(a: Any, b: Any, offsets: Any, bias: Any, dtype: str, starts: Any) -> Any:
    return _grouped_gemm(a, b, offsets, bias, dtype, starts, False)


def grouped_gemm_out(
    a: Any, b: Any, offsets: Any, bias: Any, out: Any, accumulate: bool, starts: Any
) -> Any:
    assert accumulate
    return _multiply(a, b, offsets, bias, out.dtype.name, starts, False, out=out)


def _wgrad(a: Any, dc: Any, offsets: Any, dtype: str, starts: Any, out: Any = None) -> Any:
    for name, x in (("a", a), ("dc", dc)):
        if x.ndim != 2:
            raise ValueError(f"grouped_gemm_wgrad: {name}: expected 2 dimensions, got {x.ndim}")
    results = [result((offsets.shape[0], a.shape[1], dc.shape[1]), named(dtype))]
    if out is None:
        return call("grouped_gemm_wgrad", results, a, dc, offsets, starts, accumulate=False)[0]
    arguments = a, dc, offsets, starts, out
    return call("grouped_gemm_wgrad", results, *arguments, accumulate=True, aliases={4: 0})[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_gemm_wgrad(a: Any, dc: Any, offsets: Any, dtype: str, starts: Any) -> Any:
    return _wgrad(a, dc, offsets, dtype, starts)


def _wgrad_backward(dtype: str, kept: Any, grad: Any) -> Any:
    """Both operands are rows: each gets the other's rows times its group's matrix."""
    a, dc, offsets, starts = kept
    name, grad = a.dtype.name, grad.astype(a.dtype)
    da = _multiply(dc, grad, offsets, None, name, starts, True)
    return da, _multiply(a, grad, offsets, None, name, starts, False), None, None


grouped_gemm_wgrad.defvjp(
    lambda a, dc, offsets, dtype, starts: (
        grouped_gemm_wgrad(a, dc, offsets, dtype, starts),
        (a, dc, offsets, starts),
    ),
    _wgrad_backward,
)


def grouped_gemm_wgrad_out(
    a: Any, dc: Any, offsets: Any, out: Any, accumulate: bool, starts: Any
) -> Any:
    assert accumulate
    return _wgrad(a, dc, offsets, out.dtype.name, starts, out)


# ---- quantised weights [E, N, K], which have no gradient of their own


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def quantized_gemm(a: Any, data: Any, scale: Any, offsets: Any, bias: Any, dtype: str) -> Any:
    return _multiply(a, data, offsets, bias, dtype, None, True, scale)


def _quantized_forward(a: Any, data: Any, scale: Any, offsets: Any, bias: Any, dtype: str) -> Any:
    kept = data, scale, offsets, bias, jnp.zeros(0, a.dtype)
    return quantized_gemm(a, data, scale, offsets, bias, dtype), kept


def _quantized_backward(dtype: str, kept: Any, grad: Any) -> Any:
    data, scale, offsets, bias, rows = kept
    grad = grad.astype(rows.dtype)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), offsets[:-1]])
    form = Int4GroupWeight if data.dtype == jnp.int32 else Fp8BlockWeight

    def added(e: Any, da: Any) -> Any:  # one matrix at a time is dequantised
        one = lambda x: jax.lax.dynamic_slice_in_dim(x, e, 1)  # noqa: E731
        matrix = form(one(data), one(scale)).dequantize(grad.dtype)
        return _multiply(
            grad, matrix, one(offsets), None, grad.dtype.name, one(starts), False, out=da
        )

    whole = form(data, scale).shape
    da = jax.lax.fori_loop(0, whole[0], added, jnp.zeros((grad.shape[0], whole[2]), grad.dtype))
    return da, None, None, None, _bias_gradient(bias, grad, offsets, None)


quantized_gemm.defvjp(_quantized_forward, _quantized_backward)


def fp8_product(a: Any, b: Any, offsets: Any, bias: Any, dtype: str) -> Any:
    """Of FP8 rows and FP8 blocks by the kernel of Hopper, which reads scales with rows side by
    side."""
    rows = a.data.shape[0]
    scale = jnp.pad(a.scale.T, ((0, 0), (0, -rows % 4)))
    results = [result((rows, b.data.shape[1]), named(dtype))]
    arguments = a.data, scale, b.data, b.scale, offsets, bias
    return call("grouped_gemm_fp8", results, *arguments, cuda=True)[0]


# ---- experts


@functools.partial(jax.custom_vjp, nondiff_argnums=(11, 12, 13, 14))
def _experts(*arguments: Any) -> Any:
    return compute(*(*arguments[:-1], False))[0]


def compute(
    x: Any, up: Any, down: Any, weights: Any, row_map: Any, source: Any, offsets: Any,
    up_scale: Any, down_scale: Any, b_gate_up: Any, b_down: Any, activation: str,
    numbers: tuple[float, ...], weights_first: bool, save: bool,
) -> Any:  # fmt: skip
    for name, w in (("w_gate_up", up), ("w_down", down)):
        if w.ndim != 3:
            raise ValueError(f"fused_experts: {name}: expected 3 dimensions, got {w.ndim}")
    results = [like(x), result((source.shape[0] if save else 0, up.shape[1]), x.dtype)]
    return call(
        "fused_experts", results, x, up, up_scale, down, down_scale, b_gate_up, b_down, weights,
        row_map, source, offsets, activation=activation, numbers=list(numbers),
        weights_first=weights_first,
    )  # fmt: skip


def _experts_forward(*arguments: Any) -> Any:
    y, gate_up = compute(*arguments)
    return y, (*arguments[:7], *arguments[9:11], gate_up if arguments[-1] else None)


def _experts_backward(
    activation: str, numbers: tuple[float, ...], weights_first: bool, save: bool, kept: Any, dy: Any
) -> Any:
    x, up, down, weights, *plan, b_gate_up, b_down, gate_up = kept
    biases = [bias for bias in (b_gate_up, b_down) if bias is not None]
    results = [like(value) for value in (x, up, down, weights, *biases)]
    dx, dup, ddown, dweights, *rest = call(
        "fused_experts_backward", results, dy, x, up, None, down, None, b_gate_up, b_down, weights,
        *plan, gate_up, activation=activation, numbers=list(numbers),
    )  # fmt: skip
    of_biases = [None if bias is None else rest.pop(0) for bias in (b_gate_up, b_down)]
    return dx, dup, ddown, dweights, None, None, None, None, None, *of_biases


_experts.defvjp(_experts_forward, _experts_backward)


def fused_experts_planned(*arguments: Any) -> Any:
    """y alone, where [g; u] is for a backward."""
    return (_experts(*arguments),)


# ---- the optimizer's


def newton_schulz(
    stack: Any, numbers: list[float], restarts: list[int], method: int, dtype: str, eps: float,
    aol: bool,
) -> Any:  # fmt: skip
    name = ("standard", "symmetric", "gram")[method]
    options: dict[str, Any] = {
        "coefficients": numbers,
        "restarts": restarts,
        "eps": eps,
        "aol": aol,
    }
    return call("newton_schulz", [like(stack)], stack, method=name, dtype=dtype, **options)[0]


def matrix_product(a: Any, b: Any, c: Any, alpha: float, beta: float, symmetric: bool) -> Any:
    results = [result((a.shape[0], b.shape[1]), a.dtype)]
    numbers: dict[str, Any] = {"alpha": alpha, "beta": beta, "symmetric": symmetric}
    return call("matrix_product", results, a, b, c, **numbers)[0]


def attention_max_logits(q: Any, k: Any, scale: float, causal: bool) -> Any:
    if q.ndim != 4:
        raise ValueError(f"attention_max_logits: q: expected 4 dimensions, got {q.ndim}")
    results = [result((q.shape[1],), F32)]
    return call("attention_max_logits", results, q, k, scale=scale, causal=causal)[0]
