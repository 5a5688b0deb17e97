# SPDX-License-Identifier: MIT
"""`kimi_ops.numpy` on arrays of a GPU: the kernels run on the host, in the memory of a library that
makes it, and on the stream that was named."""

import functools
import importlib
import re
import sys
import types

import numpy as np
import pytest

import kimi_ops
import kimi_ops.numpy as kn
from kimi_ops.numpy import arrays, calls
from tests.arrays.cases import CASES
from tests.arrays.on_device import LIBRARY, Device, Library
from tests.arrays.test_array_results import same, tensors
from tests.conftest import SIMT

pytestmark = pytest.mark.skipif(SIMT is None, reason="no _simt module: make test builds it")

STREAM = 0x7F00_1230
F32, I32 = np.float32, np.int32
STORED = re.compile(r"(grouped_gemm|fused_experts) (with|of) (Fp8|Int4|FP8)")  # none on CUDA


@pytest.fixture(autouse=True)
def kernels_on_the_host(monkeypatch):
    for module in (arrays, calls):
        monkeypatch.setattr(module, "_C", SIMT)
    SIMT.take_streams()
    Device.streams.clear()
    Library.made.clear()


def there(*shape, dtype=F32):
    return Device(np.ones(shape, dtype))


def held(tree):
    """NumPy's arrays of results, all of which lie on the device."""
    if isinstance(tree, (tuple, list)):
        return [held(one) for one in tree]
    assert type(tree) is Device
    return tree.held


@pytest.mark.parametrize("name", CASES)
def test_what_arrays_of_numpy_give(name, monkeypatch):
    case = CASES[name]
    given = {key: Device(value.copy()) for key, value in case.inputs.items()}
    if STORED.match(name):
        with (
            kn.stream(STREAM),
            pytest.raises((TypeError, ValueError), match="dequanti[sz]e|expected"),
        ):
            case.function(kn, **given)
        return
    with kn.stream(STREAM):
        ours = held(case.function(kn, **given))
    composed = name.split()[0] in ("normalized_scores", "quantile_bias") or "quantize" in name
    assert SIMT.take_streams() == ([] if composed else [STREAM])
    assert set(Device.streams) == (set() if composed else {STREAM})
    expected = case.function(kimi_ops, **tensors(case))
    same(ours, expected, max(case.tolerance, 1e-5))


def test_results_written_in_place():
    bias = there(4)
    assert kn.update_expert_bias_(bias, Device(np.array([1, 5, 2, 2], I32)), 0.5) is bias
    assert np.array_equal(bias.held, [1.5, 0.5, 1.5, 1.5])
    matrix, buffer = there(3, 4), Device(np.zeros((3, 4), F32))
    (update,) = kn.muon_momentum_([there(3, 4)], [buffer], 0.5)
    assert np.all(buffer.held == 0.5) and np.all(update.held == 0.75)
    kn.muon_update_([matrix], [update], [0.5])
    assert np.all(matrix.held == 0.625)


def test_memory_in_another_order_is_copied_there():
    wide = Device(np.zeros((6, 10), F32))
    out = wide[:, ::2]
    a, b, ends = there(6, 4), there(2, 4, 5), Device(np.array([2, 6], I32))
    assert kn.grouped_gemm(a[::-1], b.swapaxes(1, 2).swapaxes(1, 2), ends, out=out) is out
    assert np.all(wide.held[:, ::2] == 4) and not wide.held[:, 1::2].any()
    tall = kn.newton_schulz(Device(np.asfortranarray(np.ones((3, 5), F32))))
    assert held(tall).shape == (3, 5)


def test_bfloat16_crosses_as_its_bits():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    plan = kn.permute_plan(Device(np.array([[0], [1]], I32)), 2)
    rows = kn.permute(there(2, 8, dtype=bfloat16), plan)
    assert rows.held.dtype == bfloat16 and np.all(rows.held == 1)
    assert "uint16" in Library.made and "bfloat16" not in Library.made


def test_the_default_stream():
    kn.z_loss(there(2, 4))
    assert SIMT.take_streams() == [1] and set(Device.streams) == {1}
    with kn.stream(0):
        kn.z_loss(there(2, 4))
    assert SIMT.take_streams() == [1]


def test_ids_are_read_where_checks_are_asked_for(monkeypatch):
    ids = Device(np.array([[0, 9]], I32))
    kn.topk_gate(there(1, 4), ids=ids)
    monkeypatch.setenv("KIMI_OPS_CHECK", "1")
    monkeypatch.setattr(np, "from_dlpack", lambda x, device: x.held if device == "cpu" else None)
    with pytest.raises(ValueError, match="ids: expected|id"):
        kn.topk_gate(there(1, 4), ids=ids)


# ---- CuPy


@pytest.fixture
def cupy(monkeypatch):
    """A module of that name: a current device, a current stream of it, no `device` of `empty`."""
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    module = types.ModuleType("cupy")
    module.__getattr__ = lambda name: getattr(LIBRARY, name)
    module.empty = lambda shape, dtype: LIBRARY.empty(shape, dtype=dtype, device=Device.place)
    stream, elsewhere = types.SimpleNamespace(ptr=0x50), types.SimpleNamespace(ptr=0x40)
    module.cuda = types.SimpleNamespace(
        get_current_stream=lambda: stream if entered and entered[-1] else elsewhere, Device=Current
    )
    module.stream, module.entered = stream, entered
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(Device, "__array_namespace__", lambda self: module)
    return module


def test_the_current_stream_and_device_of_cupy(cupy):
    kn.z_loss(there(2, 4))
    assert SIMT.take_streams() == [0x50] and cupy.entered == 2 * [(2, 0), None]
    cupy.stream.ptr = 0  # its default stream
    kn.z_loss(there(2, 4))
    assert SIMT.take_streams() == [1]
    cupy.stream.ptr = 0x60
    with kn.stream(0x60):
        kn.z_loss(there(2, 4))
    message = "expected CuPy's current stream 0x60, got 0x70; use it by"
    with kn.stream(0x70), pytest.raises(ValueError, match=message):
        kn.z_loss(there(2, 4))


def test_a_cupy_whose_arrays_name_no_namespace(cupy, monkeypatch):
    monkeypatch.delattr(Device, "__array_namespace__")
    monkeypatch.setattr(Device, "__module__", "cupy")
    gate = kn.dense_gate(there(2, 4), 2)
    assert type(gate.probs) is Device and SIMT.take_streams() == [0x50]


# ---- refusals


class Bare:
    """An array on a GPU of a library that says nothing."""

    dtype, shape, ndim = np.dtype(F32), (2, 4), 2

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **_):
        raise AssertionError("refused before")


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("torch", "got torch.Bare on a GPU; call the function of kimi_ops, which has its memory"),
        ("jaxlib._jax", "call the function of kimi_ops.jax, which has its memory"),
        ("other", r"whose __array_namespace__\(\) has `empty`, got other.Bare on a GPU; pass cupy"),
    ],
)
def test_arrays_of_others(module, advice):
    x = type("Bare", (Bare,), {"__module__": module})()
    for call in (kn.z_loss, lambda x: kn.topk_gate(x, 2, mask=x), kn.normalized_scores):
        with pytest.raises(
            TypeError, match=f"^kimi_ops.numpy: expected an array of CuPy.*{advice}"
        ):
            call(x)


def test_arrays_without_their_library_around_them():
    with pytest.raises(TypeError, match="on cuda:0; call the function of kimi_ops.numpy"):
        SIMT.z_loss(there(2, 4), 1.0, None)


@pytest.mark.parametrize("place", [(2, 1), (1, 0)])
def test_one_device_a_call(place):
    """Each array beside the first one, of every op, also those that may be left out."""
    elsewhere = type("Elsewhere", (Device,), {"place": place})
    seen = set()
    for op, arguments in recorded_calls():
        places = [path for path, _ in found(arguments)]
        for path in places[1:]:
            changed = replaced(arguments, path, lambda x: elsewhere(x.held))
            with pytest.raises(ValueError, match=r": expected on cuda:0 as .*copy it to that"):
                calls.call(op, *changed)
            seen.add((op, path))
    assert len({op for op, _ in seen}) > 20 and len(seen) > 90


@functools.cache
def recorded_calls():
    """(native function, arguments), one for each number of arrays that an op is given."""
    log = {}

    class Recorder:
        def __getattr__(self, op):
            function = getattr(SIMT, op)

            def call(*arguments):
                plain = unwrapped(arguments)
                log.setdefault((op, tuple(path for path, _ in found(plain))), (op, plain))
                return function(*arguments)

            return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "_C", Recorder())
        for name, case in CASES.items():
            if not STORED.match(name):
                case.function(kn, **{key: Device(v.copy()) for key, v in case.inputs.items()})
        passes()
    return list(log.values())


def passes():
    """What no case has: the passes, and the gradients."""
    scalar = lambda dtype=np.float64: Device(np.array(1, dtype))  # noqa: E731
    squares, pieces = there(2, dtype=np.float64), [(0, 1), (1, 2)]
    two = lambda: [there(3, 4), there(3, 4)]  # noqa: E731
    kn.muon_momentum_(two(), two(), 0.5, squares=squares, pieces=pieces)
    kn.muon_update_(two(), two(), [0.1, 0.1], squares=squares, pieces=pieces, lr=scalar(),
                    weight_decay=scalar())  # fmt: skip
    kn.adamw_(two(), two(), two(), two(), [scalar(F32), scalar(F32)], squares=squares,
              pieces=pieces, scale=scalar(F32), lr_factor=scalar(),
              weight_decay_factor=scalar())  # fmt: skip
    kn.squares_(squares, two(), pieces, [12, 12])
    kn.clip_rows_([there(4, 4)], there(2), [2, 1], [0, 2, 2, 0, 2, 0], [0.5], 1.0)
    kn.update_expert_bias_(there(4), there(4, dtype=I32), 0.1)
    logits, bounds = there(5, 4), Device(np.array([-1, 1], F32))
    valid = there(5, dtype=bool)
    kn.quantile_histogram_(there(4, 8, dtype=I32), logits, 2, bounds=bounds, expert_bias=there(4),
                           valid=valid)  # fmt: skip
    gate = kn.topk_gate(logits, 2)
    plan = kn.permute_plan(gate.indices, 4)
    kn.topk_gate_backward(gate.weights, logits, gate.indices)
    kn.z_loss_backward(scalar(F32), logits, valid=valid)
    kn.sequence_balance_loss_backward(scalar(F32), logits, gate.indices, valid=valid,
                                      offsets=Device(np.array([2, 5], I32)))  # fmt: skip
    x, up, down = there(5, 8), there(4, 12, 8), there(4, 8, 6)
    biases = {"b_gate_up": there(4, 12), "b_down": there(4, 8)}
    y, both = kn.fused_experts_planned(x, up, down, gate.weights, plan, save=True, **biases)
    kn.fused_experts_backward(y, x, up, down, gate.weights, plan, gate_up=both, **biases)
    kn.unpermute_backward(y, kn.permute(x, plan), plan, gate.weights)


def unwrapped(tree):
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(unwrapped, tree))
    return tree.held if isinstance(tree, arrays.Array) else tree


def found(tree, path=()):
    """(path, array) of every array in arguments."""
    if isinstance(tree, (list, tuple)):
        return [one for i, part in enumerate(tree) for one in found(part, (*path, i))]
    return [(path, tree)] if isinstance(tree, Device) else []


def replaced(tree, path, change):
    if not path:
        return change(tree)
    parts = list(tree)
    parts[path[0]] = replaced(parts[path[0]], path[1:], change)
    return type(tree)(parts)


@pytest.mark.parametrize(
    ("handle", "error", "message"),
    [
        (-1, ValueError, "expected 0..2"),
        (True, TypeError, "got bool; pass its address"),
        ("0x1", TypeError, "got str; pass its address"),
    ],
)
def test_streams_that_are_none(handle, error, message):
    with pytest.raises(error, match=f"^stream: handle: .*{message}"), kn.stream(handle):
        pass


def test_a_build_without_cuda(monkeypatch):
    library = importlib.import_module("kimi_ops._library")._C
    if library.cuda_architectures():
        pytest.skip("this build has CUDA kernels")
    monkeypatch.setattr(calls, "_C", library)
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels; rebuild with nvcc"):
        kn.z_loss(there(2, 4))
