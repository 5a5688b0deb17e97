# SPDX-License-Identifier: MIT
"""The router's native functions, and those of rows, as custom calls: with the arguments that
csrc/bindings gives them, and their gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kimi_ops.jax.calls import call, like, result

F32, I32 = jnp.float32, jnp.int32


def _matrix(op: str, name: str, x: Any) -> tuple[int, int]:
    if x.ndim != 2:
        raise ValueError(f"{op}: {name}: expected 2 dimensions, got {x.ndim}; reshape it")
    return x.shape[0], x.shape[1]


def _gate_results(op: str, logits: Any, k: int) -> list[jax.ShapeDtypeStruct]:
    tokens, experts = _matrix(op, "logits", logits)
    return [result((tokens, k), F32), result((tokens, k), I32), result((experts,), I32)]


def _gate_gradient(score: str, renormalize: bool, scaling: float, kept: Any, grads: Any) -> Any:
    logits, indices = kept
    weighting: dict[str, Any] = {
        "score_function": score, "renormalize": renormalize, "scaling_factor": scaling
    }  # fmt: skip
    return call("topk_gate_backward", [like(logits)], grads[0], logits, indices, **weighting)[0]


def _choice(op: str, places: int) -> Any:
    """topk_gate, or gate_plan with more results."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 4, 5, 6, 7, 8, 10))
    def gate(
        logits: Any, k: int, score: str, bias: Any, num_groups: int, topk_groups: int,
        group_score_topk: int, renormalize: bool, scaling: float, valid: Any, select: str,
    ) -> Any:  # fmt: skip
        results = _gate_results(op, logits, k)
        if places:
            tokens, experts = logits.shape
            shapes = (tokens, k), (tokens * k,), (experts,)
            results += [result(shape, I32) for shape in shapes]
        return call(
            op, results, logits, bias, valid, k=k, score_function=score, num_groups=num_groups,
            topk_groups=topk_groups, group_score_topk=group_score_topk, renormalize=renormalize,
            scaling_factor=scaling, select=select,
        )  # fmt: skip

    def forward(logits: Any, *arguments: Any) -> Any:
        found = gate(logits, *arguments)
        return found, (logits, found[1])

    def backward(
        k: int, score: str, num_groups: int, topk_groups: int, group_score_topk: int,
        renormalize: bool, scaling: float, select: str, kept: Any, grads: Any,
    ) -> Any:  # fmt: skip
        return _gate_gradient(score, renormalize, scaling, kept, grads), None, None

    gate.defvjp(forward, backward)
    return gate


topk_gate, gate_plan = _choice("topk_gate", 0), _choice("gate_plan", 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def topk_gate_given(
    logits: Any, ids: Any, score: str, renormalize: bool, scaling: float, valid: Any
) -> Any:
    results = _gate_results("topk_gate_given", logits, ids.shape[1])
    return call(
        "topk_gate_given", results, logits, ids, valid, score_function=score,
        renormalize=renormalize, scaling_factor=scaling,
    )  # fmt: skip


def _given_forward(logits: Any, *arguments: Any) -> Any:
    found = topk_gate_given(logits, *arguments)
    return found, (logits, found[1])


topk_gate_given.defvjp(_given_forward, lambda *arguments: (_gate_gradient(*arguments), None, None))


def update_expert_bias_(bias: Any, tokens_per_expert: Any, rate: float, centered: bool) -> Any:
    return call(
        "update_expert_bias", [like(bias)], bias, tokens_per_expert, aliases={0: 0}, rate=rate,
        centered=centered,
    )[0]  # fmt: skip


def quantile_histogram_(
    histogram: Any, logits: Any, cutoffs: Any, bounds: Any, score: str, valid: Any
) -> Any:
    fixed = jax.lax.stop_gradient((logits, cutoffs))
    return call(
        "quantile_histogram", [like(histogram)], histogram, *fixed, bounds, valid,
        aliases={0: 0}, score_function=score,
    )[0]  # fmt: skip


def sequence_counts(
    indices: Any, num_experts: int, num_sequences: int, offsets: Any, valid: Any
) -> Any:
    _matrix("sequence_counts", "indices", indices)
    results = [result((num_sequences, num_experts), I32), result((num_sequences,), I32)]
    return call(
        "sequence_counts", results, indices, offsets, valid, num_experts=num_experts,
        num_sequences=num_sequences,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def sequence_balance_loss(
    logits: Any, counts: Any, tokens: Any, offsets: Any, valid: Any, k: int, score: str,
    coefficient: float,
) -> Any:  # fmt: skip
    arguments = logits, counts, tokens, offsets, valid
    options: dict[str, Any] = {"k": k, "score_function": score, "coefficient": coefficient}
    return call("sequence_balance_loss", [result((), F32)], *arguments, **options)[0]


def _balance_backward(k: int, score: str, coefficient: float, kept: Any, grad: Any) -> Any:
    options: dict[str, Any] = {"k": k, "score_function": score, "coefficient": coefficient}
    op = "sequence_balance_loss_backward"
    return call(op, [like(kept[0])], grad, *kept, **options)[0], None, None, None, None


sequence_balance_loss.defvjp(
    lambda *arguments: (sequence_balance_loss(*arguments), arguments[:5]), _balance_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def z_loss(logits: Any, coefficient: float, valid: Any) -> Any:
    tokens, _ = _matrix("z_loss", "logits", logits)
    results = [result((), F32), result((tokens,), F32), result((), I32)]
    return call("z_loss", results, logits, valid, coefficient=coefficient)


def _z_forward(logits: Any, coefficient: float, valid: Any) -> Any:
    found = z_loss(logits, coefficient, valid)
    return found, (logits, *found[1:])


def _z_backward(coefficient: float, kept: Any, grads: Any) -> Any:
    results = [like(kept[0])]
    return call("z_loss_backward", results, grads[0], *kept, coefficient=coefficient)[0], None


z_loss.defvjp(_z_forward, _z_backward)


def permute_plan(indices: Any, num_experts: int, align: int) -> Any:
    tokens, k = _matrix("permute_plan", "indices", indices)
    rows = tokens * k + num_experts * (align - 1)
    results = [
        result(shape, I32) for shape in ((tokens, k), (rows,), (num_experts,), (num_experts,))
    ]
    return call("permute_plan", results, indices, num_experts=num_experts, align=align)


@jax.custom_vjp
def permute(x: Any, row_map: Any, source: Any) -> Any:
    _matrix("permute", "x", x)
    return call("permute", [result((source.shape[0], x.shape[1]), x.dtype)], x, row_map, source)[0]


@jax.custom_vjp
def unpermute(y: Any, row_map: Any, source: Any, weights: Any) -> Any:
    _matrix("unpermute", "y", y)
    return call(
        "unpermute", [result((row_map.shape[0], y.shape[1]), y.dtype)], y, row_map, weights
    )[0]


permute.defvjp(
    lambda x, *maps: (permute(x, *maps), maps),
    lambda maps, grad: (unpermute(grad, *maps, None), None, None),
)


def _unpermute_backward(kept: Any, grad: Any) -> Any:
    y, row_map, source, weights = kept
    if weights is None:
        return permute(grad, row_map, source), None, None, None
    results = [like(y), like(weights)]
    dy, dweights = call("unpermute_backward", results, grad, y, row_map, source, weights)
    return dy, None, None, dweights


unpermute.defvjp(lambda *arguments: (unpermute(*arguments), arguments), _unpermute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sort_chunks(x: Any, sizes: Any, order: Any, inverse: bool) -> Any:
    return call("sort_chunks", [like(x)], x, sizes, order, inverse=inverse)[0]


sort_chunks.defvjp(
    lambda x, sizes, order, inverse: (sort_chunks(x, sizes, order, inverse), (sizes, order)),
    lambda inverse, kept, grad: (sort_chunks(grad, *kept, not inverse), None, None),
)
