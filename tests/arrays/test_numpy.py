# SPDX-License-Identifier: MIT
"""`kimi_ops.numpy`: the ops on arrays, with torch neither there nor needed."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import kimi_ops.numpy as kn

ROOT = Path(__file__).resolve().parents[2]
RANDOM = np.random.default_rng(0)
F32, I32 = np.float32, np.int32


def f(*shape, dtype=F32):
    return RANDOM.standard_normal(shape, F32).astype(dtype)


def bfloat16():
    return pytest.importorskip("ml_dtypes").bfloat16


def layer(dtype, tokens=7, hidden=16, width=12, experts=4, k=2):
    gate = kn.topk_gate(f(tokens, experts), k)
    x, up = f(tokens, hidden, dtype=dtype), f(experts, 2 * width, hidden, dtype=dtype)
    return x, up, f(experts, hidden, width, dtype=dtype), gate


def plain(x, up, down, gate):
    """The experts in float64."""
    x, up, down = (value.astype(np.float64) for value in (x, up, down))
    y = np.zeros_like(x)
    for t in range(x.shape[0]):
        for w, e in zip(gate.weights[t], gate.indices[t], strict=True):
            g, u = np.split(up[e] @ x[t], 2)
            y[t] += w * (down[e] @ (g / (1 + np.exp(-g)) * u))
    return y


def run(code):
    environment = {"PYTHONPATH": str(ROOT / "python"), "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_no_torch_is_loaded():
    code = """
import sys
import numpy as np
import kimi_ops.numpy as kn
gate = kn.topk_gate(np.ones((4, 8), np.float32), 2)
plan = kn.permute_plan(gate.indices, 8)
assert kn.permute(np.ones((4, 3), np.float32), plan).shape == (8, 3)
import kimi_ops
kimi_ops.get_include(), kimi_ops.__version__
print("torch" in sys.modules)
"""
    assert run(code) == ["False"]


@pytest.mark.parametrize(
    "code",
    [
        "import kimi_ops, torch; print(torch.ops.kimi_ops.topk_gate)",
        "import torch, kimi_ops; print(torch.ops.kimi_ops.topk_gate)",
        "import kimi_ops.numpy, torch; print(torch.ops.kimi_ops.topk_gate)",
        "import kimi_ops; kimi_ops.MuonClip; import torch; print(torch.ops.kimi_ops.topk_gate)",
        "from kimi_ops.moe.topk_gate import topk_gate as f; import kimi_ops as k\n"
        "print('kimi_ops.topk_gate' if k.topk_gate is f and callable(k.info) else 0)",
        "from kimi_ops import *; topk_gate; print('kimi_ops.topk_gate')",
        "import kimi_ops; assert 'topk_gate' in dir(kimi_ops); print('kimi_ops.topk_gate')",
    ],
)
def test_with_torch_all_of_the_package_is_there(code):
    pytest.importorskip("torch")
    assert run(code) == ["kimi_ops.topk_gate"]


def test_names_that_are_not_there():
    import kimi_ops

    with pytest.raises(AttributeError, match="has no attribute '_nothing'"):
        _ = kimi_ops._nothing


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_experts(name):
    dtype = bfloat16() if name == "bfloat16" else np.dtype(name)
    x, up, down, gate = layer(dtype)
    y = kn.fused_experts(x, up, down, gate.weights, gate.indices.astype(np.int64))
    assert type(y) is np.ndarray and y.dtype == dtype and y.flags.writeable
    want = plain(x, up, down, gate)
    error = np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want)
    assert error < {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[name]


def test_weights_of_16_bits_and_the_rows_by_hand():
    dtype = bfloat16()
    x, up, down, gate = layer(dtype)
    plan = kn.permute_plan(gate.indices, 4)
    g, u = np.split(
        kn.grouped_gemm(
            kn.permute(x, plan), up.swapaxes(1, 2), plan.offsets, out_dtype=F32
        ), 2, axis=1,
    )  # fmt: skip
    rows = kn.grouped_gemm(
        (g / (1 + np.exp(-g)) * u).astype(dtype), down.swapaxes(1, 2), plan.offsets
    )
    by_hand = kn.unpermute(rows, plan, gate.weights.astype(dtype)).astype(F32)
    fused = kn.fused_experts(x, up, down, gate.weights, gate.indices).astype(F32)
    assert np.linalg.norm(by_hand - fused) < 1e-2 * np.linalg.norm(fused)


def test_gradients_agree_with_differences():
    x, up, down, gate = layer(F32, tokens=3, hidden=6, width=4)
    plan, dy, step = kn.permute_plan(gate.indices, 4), f(3, 6), 1e-2
    grads = kn.fused_experts_backward(dy, x, up, down, gate.weights, plan)
    for i, value in enumerate((x, up, down, gate.weights)):
        along = f(*value.shape)
        shifted = [
            plain(*(v + s * step * along if j == i else v for j, v in enumerate((x, up, down))),
                  gate._replace(weights=gate.weights + (s * step * along if i == 3 else 0)))
            for s in (1, -1)
        ]  # fmt: skip
        want = np.sum(dy * (shifted[0] - shifted[1])) / (2 * step)
        assert np.sum(grads[i] * along) == pytest.approx(want, rel=2e-3, abs=1e-3)


def test_strided_and_read_only_arrays_are_read():
    logits = f(5, 16)
    wide = np.repeat(logits, 2, axis=1)[:, ::2]
    wide.flags.writeable = False
    for ours, theirs in zip(kn.topk_gate(wide, 3), kn.topk_gate(logits, 3), strict=True):
        assert np.array_equal(ours, theirs)
    row = np.broadcast_to(logits[0], (5, 16))
    assert (kn.topk_gate(row, 3).indices == kn.topk_gate(logits[:1], 3).indices).all()
    a, b, ends = f(6, 4), f(2, 4, 3), np.array([2, 6], I32)
    out = np.zeros((6, 6), F32)[:, ::2]
    assert kn.grouped_gemm(a[::-1][::-1], b, ends, out=out) is out
    assert np.array_equal(out, kn.grouped_gemm(a, b, ends))


def backwards(x):
    return np.ascontiguousarray(x[::-1])[::-1]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, plan: kn.topk_gate(x, 3),
        lambda x, plan: kn.permute(x, plan),
        lambda x, plan: kn.unpermute(x, kn.permute_plan(np.arange(6, dtype=I32)[:, None], 6)),
        lambda x, plan: kn.sort_chunks(x, np.array([2, 4], I32), np.array([1, 0], I32)),
        lambda x, plan: kn.newton_schulz(x),
    ],
)
def test_rows_that_run_backwards(call):
    x, plan = f(6, 16), kn.permute_plan(RANDOM.integers(0, 4, (6, 2), I32), 4)
    for ours, theirs in zip(call(backwards(x), plan), call(x, plan), strict=True):
        assert np.array_equal(ours, theirs)


def test_one_row_has_no_direction():
    """NumPy keeps the negative stride of one row, and calls it contiguous."""
    one, plan = f(1, 16), kn.permute_plan(np.array([[2, 0]], I32), 4)
    turned = one[::-1]
    assert turned.strides[0] < 0 and np.ascontiguousarray(turned).strides[0] < 0
    for ours, theirs in (
        (kn.topk_gate(turned, 2), kn.topk_gate(one, 2)),
        (kn.permute(turned, plan), kn.permute(one, plan)),
        (kn.z_loss(turned), kn.z_loss(one)),
    ):
        several = isinstance(ours, tuple)
        for got, want in zip(
            ours if several else [ours], theirs if several else [theirs], strict=True
        ):
            assert np.array_equal(got, want)


def test_products_of_rows_that_run_backwards():
    """Also over the rows: the depth of a weight's gradient."""
    a, b, dc, ends = f(40, 48), f(2, 48, 64), f(40, 64), np.array([17, 40], I32)
    want, grad = kn.grouped_gemm(a, b, ends), kn.grouped_gemm_wgrad(a, dc, ends)
    assert np.abs(kn.grouped_gemm(backwards(a), b, ends) - want).max() < 1e-4
    turned = np.ascontiguousarray(b[:, ::-1])[:, ::-1]
    assert np.abs(kn.grouped_gemm(a, turned, ends) - want).max() < 1e-4
    for left, right in ((backwards(a), dc), (a, backwards(dc)), (backwards(a), backwards(dc))):
        assert np.abs(kn.grouped_gemm_wgrad(left, right, ends) - grad).max() < 1e-4


def test_weights_whose_rows_run_backwards_are_changed_in_place():
    weight, direction, moved = f(6, 16), f(6, 16), f(6, 16)
    moved[::-1] = weight
    kn.muon_update_([weight], [direction], [0.5], 0.1)
    kn.muon_update_([moved[::-1]], [backwards(direction)], [0.5], 0.1)
    assert np.array_equal(moved[::-1], weight)


def test_rows_that_are_all_the_same_one():
    row = f(1, 16)
    got = kn.newton_schulz(np.broadcast_to(row, (6, 16)))
    assert np.array_equal(got, kn.newton_schulz(np.repeat(row, 6, axis=0)))


def test_a_process_that_was_forked_computes():
    code = """
import os, signal
import numpy as np
import kimi_ops.numpy as kn
kn.set_num_threads(2)
x = np.arange(4096 * 64, dtype=np.float32).reshape(4096, 64) % 977
want = kn.topk_gate(x, 8)
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a process that waits for threads that it does not have
    got = kn.topk_gate(x, 8)
    os._exit(not np.array_equal(got.weights, want.weights))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == ["0"]


def test_read_only_outputs_are_left_alone():
    bias = np.zeros(4, F32)
    bias.flags.writeable = False
    with pytest.raises(ValueError, match="read-only one; copy it"):
        kn.update_expert_bias_(bias, np.array([1, 2, 3, 4], I32), 0.1)
    assert not bias.any()


def test_empty_arrays():
    gate = kn.topk_gate(f(0, 8), 2)
    assert gate.weights.shape == (0, 2) and not gate.tokens_per_expert.any()
    plan = kn.permute_plan(gate.indices, 8)
    assert kn.permute(f(0, 5), plan).shape == (0, 5)
    assert kn.z_loss(f(0, 8)) == 0
    kn.muon_update_([f(0, 4)], [f(0, 4)], [0.5], 0.1)  # NumPy's strides are 0 here, and below
    out, none = np.zeros((0, 5, 3), F32), np.zeros(0, I32)
    assert kn.grouped_gemm_wgrad(f(2, 5), f(2, 3), none, out=out, accumulate=True) is out


def test_an_array_without_an_element_is_dense():
    """Its strides, which NumPy makes 0, say nothing."""
    weight = kn.Fp8BlockWeight.quantize(np.zeros((2, 0, 8), np.float32))
    y = kn.grouped_gemm(np.ones((2, 8), np.float32), weight, np.array([1, 2]))
    assert y.shape == (2, 0)


def test_losses_and_the_optimizer():
    logits, weights = f(6, 8), f(3, 4, 7)
    want = np.log(np.exp(logits.astype(np.float64)).sum(1))
    assert np.isclose(kn.z_loss(logits, coefficient=0.5), 0.5 * np.mean(want**2))
    indices, one, step, along = kn.topk_gate(logits, 2).indices, np.array(1, F32), 1e-2, f(6, 8)
    for loss, gradient in (
        (
            lambda z: kn.sequence_balance_loss(z, indices, num_sequences=2, coefficient=1.0),
            kn.sequence_balance_loss_backward(
                one, logits, indices, num_sequences=2, coefficient=1.0
            ),
        ),
        (lambda z: kn.z_loss(z, coefficient=0.5), kn.z_loss_backward(one, logits, coefficient=0.5)),
    ):
        want = (loss(logits + step * along) - loss(logits - step * along)) / (2 * step)
        assert np.sum(gradient * along) == pytest.approx(want, rel=1e-2, abs=1e-3)
    histogram = np.zeros((8, 10), I32)
    bounds = np.array([-1, 1], F32)
    assert kn.quantile_histogram_(histogram, logits, 2, bounds=bounds) is histogram
    assert histogram.sum() == 48
    x = kn.newton_schulz(weights, steps=10, coefficients=(1.5, -0.5, 0.0), dtype=F32)
    assert np.allclose(np.linalg.svd(x, compute_uv=False), 1, atol=2e-2)
    assert kn.newton_schulz(np.asfortranarray(weights[0])).shape == (4, 7)
    assert kn.attention_max_logits(f(1, 2, 3, 4), f(1, 2, 3, 4), 0.5).shape == (2,)


def test_other_frameworks_arrays_enter_and_numpy_s_come_out():
    torch = pytest.importorskip("torch")
    logits = f(4, 8)
    ours = kn.topk_gate(torch.from_numpy(logits), 2).indices
    assert type(ours) is np.ndarray and np.array_equal(ours, kn.topk_gate(logits, 2).indices)
    with pytest.raises(TypeError, match=r"topk_gate: logits: .*require gradient"):
        kn.topk_gate(torch.from_numpy(logits).requires_grad_(), 2)


class Foreign:
    """An array of a library that follows the array API's standard."""

    def __init__(self, held):
        self.held, self.shape, self.dtype, self.ndim = held, held.shape, held.dtype, held.ndim

    def __dlpack__(self, **options):
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda x: Foreign(np.from_dlpack(x)))


def test_results_go_to_the_library_of_the_first_array():
    logits, x = f(4, 8), f(4, 3)
    gate, want = kn.topk_gate(Foreign(logits), 2), kn.topk_gate(logits, 2)
    plan = kn.permute_plan(gate.indices, 8)
    y = kn.unpermute(kn.permute(Foreign(x), plan), plan, gate.weights)
    for ours in (*gate, *plan, y):
        assert type(ours) is Foreign
    for ours, theirs in zip(gate, want, strict=True):
        assert np.array_equal(ours.held, theirs)
    want = kn.unpermute(kn.permute(x, kn.permute_plan(want.indices, 8)), kn.permute_plan(
        want.indices, 8), want.weights)  # fmt: skip
    assert np.array_equal(y.held, want)
    jax = pytest.importorskip("jax")
    z = jax.numpy.asarray(logits, jax.numpy.bfloat16)
    ours = kn.topk_gate(z, 2, mask=jax.numpy.arange(8) > 2)
    assert isinstance(ours.weights, jax.Array)
    theirs = kn.topk_gate(np.asarray(z), 2, mask=np.arange(8) > 2)
    assert np.array_equal(ours.weights, theirs.weights)


class Elsewhere(Foreign):
    def __dlpack__(self, **options):
        raise BufferError("this memory is on a GPU")


def test_an_array_that_exports_nothing_is_refused_by_its_own_words():
    with pytest.raises(TypeError, match="^topk_gate: logits: .* says: this memory is on a GPU"):
        kn.topk_gate(Elsewhere(f(4, 8)), 2)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="^grouped_gemm: expected arrays of float32"):
        kn.grouped_gemm(np.ones((2, 3)), np.ones((1, 3, 4)), np.array([2], I32))


def test_experts_that_were_chosen_elsewhere():
    logits = f(5, 8)
    gate = kn.topk_gate(logits, 3)
    given = kn.topk_gate(logits, ids=gate.indices)
    assert np.allclose(given.weights, gate.weights)
    assert np.array_equal(given.tokens_per_expert, gate.tokens_per_expert)


def test_biases_and_rows_with_gaps():
    x, up, down, gate = layer(F32)
    plan, biases = kn.permute_plan(gate.indices, 4), {"b_gate_up": f(4, 24), "b_down": f(4, 16)}
    y = kn.fused_experts(x, up, down, gate.weights, gate.indices, **biases)
    grads = kn.fused_experts_backward(np.ones_like(y), x, up, down, gate.weights, plan, **biases)
    assert len(grads) == 6 and grads[5].shape == (4, 16)
    for e in range(4):  # d sum(y) / d b_down[e]: the weights that its tokens give it
        of_expert = np.sum(gate.weights[gate.indices == e])
        assert np.allclose(grads[5][e], of_expert, rtol=1e-5)
    a, b, ends = f(6, 4), f(2, 4, 3), np.array([2, 6], I32)
    gaps = kn.grouped_gemm(a, b, ends, starts=np.array([0, 4], I32))
    assert np.allclose(gaps[4:], a[4:] @ b[1], atol=1e-5) and not gaps[2:4].any()


def test_refusals_name_the_op():
    with pytest.raises(ValueError, match=r"^topk_gate: k: expected 1\.\.8"):
        kn.topk_gate(f(4, 8), 9)
    with pytest.raises(TypeError, match="^grouped_gemm: out_dtype: expected"):
        kn.grouped_gemm(f(2, 3), f(1, 3, 4), np.array([2], I32), out_dtype="S3")
    with pytest.raises(ValueError, match="^newton_schulz: method: expected one of auto, standard"):
        kn.newton_schulz(f(3, 3), method="other")
    with pytest.raises(TypeError, match="expected an array, got list"):
        kn.topk_gate([[1.0]], 1)
