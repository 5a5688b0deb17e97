# SPDX-License-Identifier: MIT
"""`kimi_ops.jax` with the real package: every op and its gradient against plain restatements that
JAX differentiates by itself, under jit, vmap and shard_map."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import kimi_ops  # noqa: E402
import kimi_ops.jax as kj  # noqa: E402
from kimi_ops.jax import calls  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
T, H, F, E, K = 12, 16, 10, 4, 2
RANDOM = np.random.default_rng(0)


def f(*shape, dtype=jnp.float32):
    return jnp.asarray(RANDOM.standard_normal(shape, np.float32), dtype)


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = (np.asarray(value, np.float64) for value in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * (np.linalg.norm(theirs) + 1e-6)


def same_gradients(ours, theirs, arguments, tolerance=1e-5):
    """Values and gradients of sums that weigh every element, jitted and not."""
    places = tuple(range(len(arguments)))

    def scalar(function, *values):
        y = function(*values)
        along = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y.astype(jnp.float32) * along)

    close(ours(*arguments), theirs(*arguments), tolerance)
    want = jax.grad(functools.partial(scalar, theirs), places)(*arguments)
    gradient = jax.grad(functools.partial(scalar, ours), places)
    for one in (gradient, jax.jit(gradient)):
        for got, value, argument in zip(one(*arguments), want, arguments, strict=True):
            assert got.dtype == argument.dtype
            close(got, value, tolerance)


def plain_gate(logits, k=K, scaling=2.5):
    scores = jax.nn.sigmoid(logits)
    chosen, indices = jax.lax.top_k(scores, k)
    return chosen / (chosen.sum(1, keepdims=True) + 1e-20) * scaling, indices


def plain_experts(x, up, down, weights, indices):
    """Every expert computes every token; the weights choose."""
    both = jnp.einsum("th,efh->tef", x, up)
    gate, rest = jnp.split(both, 2, axis=2)
    y = jnp.einsum("tef,ehf->teh", jax.nn.silu(gate) * rest, down)
    dense = (jax.nn.one_hot(indices, up.shape[0]) * weights[..., None]).sum(1)
    return jnp.einsum("teh,te->th", y, dense)


def layer(dtype=jnp.float32):
    arrays = f(T, H), f(E, H), f(E, 2 * F, H) / 4, f(E, H, F) / 4
    return tuple(array.astype(dtype) for array in arrays)


def moe(x, router, up, down, fused=True):
    gate = kj.topk_gate(x @ router.T, K, scaling_factor=2.5)
    if fused:
        return kj.fused_experts(x, up, down, gate.weights, gate.indices)
    plan = kj.permute_plan(gate.indices, E)
    rows = kj.grouped_gemm(kj.permute(x, plan), up.swapaxes(1, 2), plan.offsets)
    g, u = jnp.split(rows, 2, axis=1)
    rows = kj.grouped_gemm(jax.nn.silu(g) * u, down.swapaxes(1, 2), plan.offsets)
    return kj.unpermute(rows, plan, gate.weights)


def plain_moe(x, router, up, down):
    return plain_experts(x, up, down, *plain_gate(x @ router.T))


@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_end_to_end(fused):
    same_gradients(functools.partial(moe, fused=fused), plain_moe, layer(), 2e-5)


def test_a_layer_in_bfloat16():
    arguments = layer(jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in arguments]
    loss = lambda *a: jnp.sum(moe(*a).astype(jnp.float32))  # noqa: E731
    got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arguments)
    indices = kj.topk_gate(arguments[0] @ arguments[1].T, K).indices
    router = lambda x, r: jnp.take_along_axis(jax.nn.sigmoid(x @ r.T), indices, 1)  # noqa: E731

    def plain(x, r, up, down):
        weights = router(x, r)
        weights = weights / weights.sum(1, keepdims=True) * 2.5
        return jnp.sum(plain_experts(x, up, down, weights, indices))

    for ours, theirs in zip(got[1], jax.grad(plain, (0, 1, 2, 3))(*wide), strict=True):
        assert ours.dtype == jnp.bfloat16
        close(ours, theirs, 3e-2)


def test_the_gate():
    logits = f(T, E)
    ours = lambda z: kj.topk_gate(z, K, scaling_factor=2.5).weights  # noqa: E731
    same_gradients(ours, lambda z: plain_gate(z)[0], (logits,))
    gate = kj.topk_gate(logits, K, expert_bias=jnp.array([0, 9, 0, 0.0]))
    assert (gate.indices[:, 0] == 1).all() and gate.tokens_per_expert.sum() == T * K
    valid = jnp.arange(T) > 0
    assert (kj.topk_gate(logits, K, valid=valid).indices[0] == -1).all()


@pytest.mark.parametrize("weighted", [True, False])
def test_rows_there_and_back(weighted):
    plan = kj.permute_plan(kj.topk_gate(f(T, E), K).indices, E, align=4)
    x, y, weights = f(T, H), f(plan.source.shape[0], H), f(T, K)
    pairs = plan.source
    gather = lambda x: jnp.where(pairs[:, None] < 0, 0, x[jnp.maximum(pairs, 0) // K])  # noqa: E731
    same_gradients(lambda x: kj.permute(x, plan), gather, (x,))
    if weighted:
        same_gradients(
            lambda y, w: kj.unpermute(y, plan, w),
            lambda y, w: jnp.einsum("tkh,tk->th", y[plan.row_map], w), (y, weights),
        )  # fmt: skip
    else:
        same_gradients(lambda y: kj.unpermute(y, plan), lambda y: y[plan.row_map].sum(1), (y,))


def test_sort_chunks():
    x, sizes, order = f(9, 3), jnp.array([2, 4, 3]), jnp.array([2, 0, 1])
    new = np.concatenate([np.arange(6, 9), np.arange(0, 2), np.arange(2, 6)])
    same_gradients(lambda x: kj.sort_chunks(x, sizes, order), lambda x: x[new], (x,))
    there = kj.sort_chunks(x, sizes, order)
    assert (kj.sort_chunks(there, sizes, order, inverse=True) == x).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ragged_dot_is_that_of_lax(dtype):
    lhs, rhs, sizes = f(9, 8, dtype=dtype), f(3, 8, 5, dtype=dtype), jnp.array([4, 0, 5])
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    ours = lambda a, b: kj.ragged_dot(a, b, sizes)  # noqa: E731
    same_gradients(ours, lambda a, b: jax.lax.ragged_dot(a, b, sizes), (lhs, rhs), tolerance)
    wide = kj.ragged_dot(lhs, rhs, sizes, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    for whole in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32):
        assert (kj.ragged_dot(lhs, rhs, sizes.astype(whole)) == ours(lhs, rhs)).all()
    with pytest.raises(TypeError, match="group_sizes: expected whole numbers, got float32; cast"):
        kj.ragged_dot(lhs, rhs, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match="ragged_dot: group_offset: expected None"):
        kj.ragged_dot(lhs, rhs, sizes, group_offset=jnp.array([1]))


def test_grouped_gemm_with_a_bias():
    a, b, bias, ends = f(9, 8), f(3, 8, 5), f(3, 5), jnp.array([4, 4, 9])
    expert = jnp.array([0] * 4 + [2] * 5)
    same_gradients(
        lambda a, b, bias: kj.grouped_gemm(a, b, ends, bias=bias),
        lambda a, b, bias: jnp.einsum("rk,rkn->rn", a, b[expert]) + bias[expert], (a, b, bias),
    )  # fmt: skip
    close(kj.grouped_gemm_wgrad(a, f(9, 5), ends)[1], jnp.zeros((8, 5)))


def test_the_losses():
    logits = f(T, E)
    indices = kj.topk_gate(logits, K).indices

    def balance(z, sequences=3):
        scores = jax.nn.sigmoid(z)
        share = (scores / scores.sum(1, keepdims=True)).reshape(sequences, -1, E).mean(1)
        counts = jax.nn.one_hot(indices, E).sum(1).reshape(sequences, -1, E).sum(1)
        fraction = counts * E / (K * T / sequences)
        return 0.1 * (fraction * share).sum(1).mean()

    ours = lambda z: kj.sequence_balance_loss(z, indices, num_sequences=3, coefficient=0.1)  # noqa: E731
    same_gradients(ours, balance, (logits,))
    plain = lambda z: 0.5 * jnp.mean(jax.nn.logsumexp(z, axis=1) ** 2)  # noqa: E731
    same_gradients(lambda z: kj.z_loss(z, coefficient=0.5), plain, (logits,))
    bias, counts = f(E), jnp.array([1, 2, 3, 6], jnp.int32)
    moved = jax.jit(lambda b: kj.update_expert_bias(b, counts, 0.25))(bias)
    step = bias + 0.25 * jnp.array([1, 1, 0, -1])
    close(moved, step)
    close(kj.update_expert_bias(bias, counts, 0.25, centered=True), step - (step - bias).mean())
    with jax.enable_x64(True):
        close(kj.update_expert_bias(bias, counts.astype(jnp.int64), 0.25), step)


def test_the_histogram_of_what_lacks():
    logits, bias, bounds = f(T, E), f(E) / 8, jnp.array([-1.0, 1.0])
    options = {"expert_bias": bias, "score_function": "softmax", "valid": jnp.arange(T) > 1}
    first = jnp.ones((E, 10), jnp.int32)
    ours = jax.jit(lambda h, z: kj.quantile_histogram(h, z, K, bounds=bounds, **options))
    theirs = torch.ones(E, 10, dtype=torch.int32)
    kimi_ops.quantile_histogram_(
        theirs, torch.tensor(np.asarray(logits)), K, bounds=torch.tensor([-1.0, 1.0]),
        **{key: torch.tensor(np.asarray(value)) if key != "score_function" else value
           for key, value in options.items()},
    )  # fmt: skip
    assert np.array_equal(ours(first, logits), theirs.numpy()) and (first == 1).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match="bounds: expected two finite numbers"):
        jax.block_until_ready(kj.quantile_histogram(first, logits, K, bounds=bounds[::-1]))


def refused(message, make):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(make())


def test_a_plan_of_other_rows_is_refused():
    plan, x, y = kj.permute_plan(jnp.zeros((T, K), jnp.int32), E), f(T, H), f(3, H)
    ids = plan.row_map, plan.source[:3]
    refused("unpermute: row_map: expected rows in", lambda: kj.unpermute(y, plan))
    refused("permute: row_map: expected rows in", lambda: calls.call("permute", [y], x, *ids))
    results, weights = [y, jnp.zeros((T, K))], f(T, K)
    refused(
        "unpermute_backward: row_map: expected rows in",
        lambda: calls.call("unpermute_backward", results, x, y, *ids, weights),
    )


def test_sequences_that_end_before_they_begin_are_refused():
    indices = jnp.zeros((T, K), jnp.int32)
    for ends in ([5, 4, T], [5, 6, T + 1]):
        for op in (
            lambda: kj.sequence_counts(indices, E, offsets=jnp.array(ends, jnp.int32)),  # noqa: B023
            lambda: calls.call(
                "sequence_balance_loss", [jnp.zeros(())], f(T, E), jnp.zeros((3, E), jnp.int32),
                jnp.zeros(3, jnp.int32), jnp.array(ends, jnp.int32), None, k=K,  # noqa: B023
                score_function="sigmoid", coefficient=0.1,
            ),
        ):  # fmt: skip
            refused("offsets: expected 0 <= ", op)


def test_what_the_optimizer_multiplies():
    g = f(2, 3, 5, 9)
    x = jax.jit(lambda g: kj.newton_schulz(g, steps=12, coefficients=(1.5, -0.5, 0)))(g)
    close(jnp.linalg.svd(x, compute_uv=False), jnp.ones((2, 3, 5)), 1e-2)
    q, k = f(2, 4, 6, 8), f(2, 2, 6, 8).at[:, :, -1].multiply(9)  # which one query sees
    scores = jnp.einsum("bhid,bhjd->bhij", q, jnp.repeat(k, 2, axis=1)) / 8
    seen = jnp.tril(jnp.ones((6, 6), bool))
    close(kj.attention_max_logits(q, k, 1 / 8), jnp.where(seen, scores, -jnp.inf).max((0, 2, 3)))


def test_vmap():
    x, router, up, down = layer()
    many = jnp.stack([x, x[::-1], 2 * x])
    ours = jax.vmap(lambda x: moe(x, router, up, down))(many)
    for got, one in zip(ours, many, strict=True):
        close(got, moe(one, router, up, down))
    loss = lambda x: jnp.sum(moe(x, router, up, down) ** 2)  # noqa: E731
    gradients = jax.jit(jax.vmap(jax.grad(loss)))(many)
    close(gradients[2], jax.grad(loss)(2 * x))


def test_shard_map_over_tokens():
    assert jax.device_count() == 2
    arguments = layer()
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = jax.shard_map(
        moe, mesh=mesh, in_specs=(P("data"), P(), P(), P()), out_specs=P("data"), check_vma=False
    )
    close(jax.jit(split)(*arguments), moe(*arguments))
    loss = lambda function, *a: jnp.sum(function(*a) ** 2)  # noqa: E731
    ours = jax.jit(jax.grad(functools.partial(loss, split), (0, 2)))(*arguments)
    whole = jax.grad(functools.partial(loss, moe), (0, 2))(*arguments)
    for got, want in zip(ours, whole, strict=True):
        close(got, want)


def test_refusals_come_while_tracing():
    with pytest.raises(ValueError, match=r"^topk_gate: logits: expected float32, bfloat16"):
        jax.jit(lambda z: kj.topk_gate(z, 2))(jnp.zeros((3, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"^grouped_gemm: b: expected shape \[any, 8, any\]"):
        kj.grouped_gemm(f(9, 8), f(3, 7, 5), jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"^topk_gate: score_function: expected one of sigmoid"):
        kj.topk_gate(f(3, 4), 2, score_function="tanh")
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"topk_gate: k: expected 1\.\.4"):
        jax.block_until_ready(kj.topk_gate(f(3, 4), 5))
    with pytest.raises(jax.errors.JaxRuntimeError, match="offsets: expected 0 <= "):
        jax.block_until_ready(kj.grouped_gemm(f(9, 8), f(2, 8, 5), jnp.array([4, 10])))


def test_no_torch_is_loaded():
    code = "import sys, kimi_ops.jax; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.stdout == "False\n", result.stderr


def test_what_is_changed_lies_where_its_result_does():
    bias, counts = f(E), jnp.array([1, 2, 3, 6], jnp.int32)
    options = {"rate": 0.25, "centered": 0}
    refused(
        "bias: expected the memory of the result",
        lambda: calls.call("update_expert_bias", [bias], bias, counts, **options),
    )
    (moved,) = calls.call("update_expert_bias", [bias], bias, counts, aliases={0: 0}, **options)
    close(moved, bias + 0.25 * jnp.array([1, 1, 0, -1]))
