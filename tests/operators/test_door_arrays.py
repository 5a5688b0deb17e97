# SPDX-License-Identifier: MIT
"""What else comes to the native functions: NumPy's arrays, other objects, and arguments that are
wrong. Faults that end the process are shown in one of their own."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch

import kimi_ops
import kimi_ops.numpy as kn
from kimi_ops import _native
from tests.operators.calls import PLAN, f, i

C = _native._C
GATE = (2, "sigmoid", None, 1, 1, 2, True, 1.0, None, "scores")
NO_FLAGS = None, [], None, None  # of muon_update_
F32 = np.float32


class Producer:
    """An object that speaks DLPack by the answer of a function."""

    def __init__(self, answer):
        self.answer = answer

    def __dlpack__(self, **options):
        return self.answer(**options)

    def __array_namespace__(self):
        return np


def fails(error):
    def answer(**_):
        raise error

    return Producer(answer)


def product(a=(6, 8), b=(2, 8, 5), ends=(2, 6)):
    return np.ones(a, F32), np.ones(b, F32), np.array(ends, np.int32)


# ---- NumPy


def test_arrays_give_arrays_with_the_same_bits():
    x = f(4, 16)
    for ours, theirs in zip(C.topk_gate(x.numpy(), *GATE), C.topk_gate(x, *GATE), strict=True):
        assert type(ours) is np.ndarray and ours.flags.writeable
        assert ours.ctypes.data % 64 == 0 and np.array_equal(ours, theirs.numpy())
    out = np.full((6, 5), 9, F32)
    assert C.grouped_gemm_out(*product(), None, out, False, None) is None and (out == 8).all()
    arrays = [np.ones((2, 3), F32)], [np.zeros((2, 3), F32)]
    update = C.muon_momentum_(*arrays, 0.5, False, False, None, [])
    assert type(update) is np.ndarray and (update == update[0]).all() and update[0] > 0


def test_arrays_and_tensors_mix():
    x, bias = f(4, 16), np.zeros(16, F32)
    first = C.topk_gate(x, 2, "sigmoid", bias, *GATE[3:])
    second = C.topk_gate(x.numpy(), 2, "sigmoid", torch.zeros(16), *GATE[3:])
    assert type(first[0]) is torch.Tensor and type(second[0]) is np.ndarray
    assert np.array_equal(first[1].numpy(), second[1])


def test_arrays_outlive_the_call_and_what_they_came_from():
    x = f(64, 16)
    arrays = [C.topk_gate(x.numpy(), *GATE)[0] for _ in range(50)]
    junk = [np.full((64, 2), 7.0, F32) for _ in range(50)]
    assert all(np.array_equal(a, arrays[0]) for a in arrays) and len(junk) == 50


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:, ::2], ValueError, r"got strides \(16, 2\); pass a contiguous copy"),
        (np.asfortranarray, ValueError, r"got strides \(1, 4\); pass a contiguous copy"),
        (lambda x: x[:, ::-1], ValueError, "pass a contiguous copy"),
        (lambda x: x[::-1], ValueError, r"got strides \(-16, 1\); pass a contiguous copy"),
        (np.float64, TypeError, "expected float32, bfloat16, float16, got float64"),
        (lambda x: x.astype(">f4"), TypeError, "expected an array that DLPack can describe"),
        (lambda x: x.astype("S4"), TypeError, "expected an array that DLPack can describe"),
        (lambda x: x[0], ValueError, r"expected shape \[T, E\], got \[16\]"),
        (lambda x: x[0, 0], TypeError, "expected an array, got numpy.float32|expected shape"),
    ],
)
def test_arrays_that_no_kernel_reads(change, error, message):
    with pytest.raises(error, match=rf"^z_loss: .*({message})"):
        C.z_loss(change(f(4, 16).numpy()), 1.0, None)


def test_outputs_that_may_not_be_written_are_left_alone():
    out = np.zeros((6, 5), F32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^grouped_gemm: out: .*read-only one; copy it"):
        C.grouped_gemm_out(*product(), None, out, False, None)
    assert not out.any()


@pytest.mark.parametrize(
    "write",
    [
        lambda x: C.update_expert_bias_(x[0], np.arange(4, dtype=np.int32), 0.1, False),
        lambda x: C.clip_rows_([x], np.full(2, 9, F32), [2, 1], [0, 2, 2, 0, 2, 0], [0.5], 1.0),
        lambda x: C.muon_momentum_([np.ones((4, 4), F32)], [x], 0.5, False, False, None, []),
        lambda x: C.muon_update_([x], [np.ones((4, 4), F32)], [0.5], 0.0, False, *NO_FLAGS),
    ],
)
def test_read_only_arrays_are_not_written(write):
    x = np.ones((4, 4), F32)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        write(x)
    assert (x == 1).all()


def test_empty_arrays_are_taken():
    assert C.z_loss(np.zeros((0, 4), F32), 1.0, None)[0] == 0


def test_ends_of_64_bits_in_an_array():
    a, b, ends = product()
    assert (C.grouped_gemm(a, b, ends.astype(np.int64), None, torch.float32, None) == 8).all()


def test_a_strided_output_array_is_refused_with_the_cure():
    with pytest.raises(ValueError, match="grouped_gemm: out: .*contiguous"):
        C.grouped_gemm_out(*product(), None, np.zeros((6, 5), F32)[:, ::-1], False, None)


def test_an_output_that_runs_backwards_over_its_input():
    memory = np.ones((2, 8, 5), F32)
    with pytest.raises(ValueError, match="expected memory of its own"):
        C.grouped_gemm_wgrad_out(
            memory[0], np.ones((8, 5), F32), np.array([2, 8], np.int32),
            memory[::-1, :5], False, None,
        )  # fmt: skip


def test_results_that_numpy_lacks_are_refused_by_name():
    with pytest.raises(TypeError, match="^fp8_rows: "):
        C.fp8_rows(np.ones((2, 4), F32))


# ---- objects that promise and break


def test_broken_producers():
    for answer, message in (
        (fails(ValueError("cannot")), "one of which Producer says: cannot"),
        (type("Number", (), {"__dlpack__": 5})(), "'int' object is not callable"),
        (object(), "expected an array, got object"),
        ("logits", "expected an array, got str"),
        (None, "expected an array, got NoneType"),
    ):
        with pytest.raises(TypeError, match=rf"^z_loss: logits: .*{message}"):
            C.z_loss(answer, 1.0, None)
    old = Producer(lambda **o: fails(TypeError())() if o else torch.ones(2, 4).__dlpack__())
    assert C.z_loss(torch.ones(2, 4), 1.0, None)[0] == C.z_loss(old, 1.0, None)[0]


def test_an_answer_that_is_no_capsule():
    with pytest.raises(TypeError, match="^z_loss: logits: "):
        C.z_loss(Producer(lambda **_: None), 1.0, None)


@pytest.mark.parametrize("of", [torch.from_numpy, np.asarray])
def test_memory_between_the_places_of_its_type(of):
    for dtype, size in ((np.float16, 2), (np.float32, 4), (np.float64, 8)):
        x = of(np.zeros(64 * size + 1, np.uint8)[1:].view(dtype).reshape(4, 16))
        with pytest.raises(ValueError, match=f"expected memory at a multiple of {size} bytes"):
            C.z_loss(x, 1.0, None)
    with pytest.raises(TypeError, match="expected float32"):
        C.z_loss(x[:0], 1.0, None)


def test_an_array_without_memory():
    capsule = torch.ones(2, 4).__dlpack__()
    point = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    ctypes.c_void_p.from_address(point(capsule, b"dltensor")).value = None
    with pytest.raises(TypeError, match="^z_loss: logits: expected a tensor with memory"):
        C.z_loss(Producer(lambda **o: fails(TypeError())() if o else capsule), 1.0, None)


# ---- options


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (True, TypeError, r"k: expected an int, got bool; pass int\(k\)"),
        (np.True_, TypeError, r"k: expected an int, got numpy.bool"),
        (2.0, TypeError, "k: expected an int, got float"),
        ("2", TypeError, "k: expected an int, got str"),
        (None, TypeError, "k: expected an int, got None"),
        (10**30, ValueError, "k: expected an int of 64 bits, got a larger one"),
        pytest.param(
            10**5000, ValueError, "k: expected an int of 64 bits", id="thousands of digits"
        ),
        (2**40, ValueError, "k: expected an int of 32 bits"),
        (-1, ValueError, r"k: expected 1\.\.16"),
    ],
)
def test_whole_numbers(k, error, message):
    with pytest.raises(error, match=f"^topk_gate: {message}"):
        kimi_ops.topk_gate(f(4, 16), k)


def test_numbers_of_numpy():
    assert kimi_ops.topk_gate(f(4, 16), np.int64(2)).indices.shape == (4, 2)
    one = kimi_ops.z_loss(f(4, 16), coefficient=1)
    assert torch.equal(one, kimi_ops.z_loss(f(4, 16), coefficient=np.float64(1)))
    for wrong in ("1", True, None, [1.0]):
        with pytest.raises(TypeError, match="^z_loss: coefficient: expected a number"):
            kimi_ops.z_loss(f(4, 16), coefficient=wrong)


def test_names_and_dtypes():
    for wrong in ("tanh", b"sigmoid", None, 1):
        with pytest.raises(ValueError, match="^topk_gate: score_function: expected one of sigmoid"):
            kimi_ops.topk_gate(f(4, 16), 2, score_function=wrong)
    for wrong in ("float32", 1, None, np.float32):
        with pytest.raises(TypeError, match="^grouped_gemm: out_dtype: expected a dtype"):
            C.grouped_gemm(*product(), None, wrong, None)
    with pytest.raises(TypeError, match=r"^z_loss: expected 3 arguments, got 1"):
        C.z_loss(f(4, 16))
    with pytest.raises(TypeError, match="no keyword arguments"):
        C.z_loss(logits=f(4, 16))


def test_lengths_that_add_up_beyond_64_bits():
    lengths = [2**63 - 1, 2**63 - 1, 6]  # 4 of them, if only the last 64 bits count
    with pytest.raises(ValueError, match=r"^squares: lengths: expected 4 elements of x\[0\]"):
        C.squares_(f(3).double(), [f(4)], [0, 3], lengths)


@pytest.mark.parametrize(
    "call",
    [
        lambda: kimi_ops.z_loss(f(4, 16), coefficient=10**400),
        lambda: C.grouped_gemm(*product(), None, [], None),
        lambda: C.squares_(f(1).double(), 3, [0, 1], [1]),
        lambda: C.squares_(f(1).double(), [f(1)], [0, 1], 1),
        lambda: kimi_ops.topk_gate(f(4, 16), np.ones(2, int)),
        lambda: C.topk_gate(f(4, 16), *GATE[:6], f(2), *GATE[7:]),
        lambda: C.muon_update_([f(2, 2)], [f(2, 2)], ["x"], 0.1, False, *NO_FLAGS),
        lambda: C.newton_schulz([f(4, 4)], [1.0, 1.0, 1.0], [1.5], 0, torch.float32, 1e-7, False),
    ],
)
def test_every_message_names_the_op(call):
    with pytest.raises(
        (TypeError, ValueError),
        match=r"^(topk_gate|z_loss|grouped_gemm|squares|muon_update|newton_schulz): ",
    ):
        call()


def test_restarts_beyond_32_bits():
    with pytest.raises(ValueError, match="^newton_schulz: restarts"):
        C.newton_schulz([f(4, 4)], [1.0, 1.0, 1.0] * 3, [2**32 + 1], 2, torch.float32, 1e-7, False)


# ---- memory


@pytest.mark.parametrize(
    "write",
    [
        lambda x: C.clip_rows_([x], f(2) + 9, [2, 1], [0, 2, 2, 0, 2, 0], [0.5], 1.0),
        lambda x: C.muon_update_([x], [torch.ones(4, 4)], [0.5], 0.0, False, *NO_FLAGS),
    ],
)
def test_expanded_tensors_are_not_written(write):
    x = torch.ones(1, 4).expand(4, 4)
    with pytest.raises((ValueError, RuntimeError)):
        write(x)
    assert (x == 1).all()


def test_expanded_tensors_are_read_as_their_copies():
    """Elements that all lie at one place: the C API takes such strides for ones nobody has set."""
    one, ends = torch.tensor(0.5), torch.tensor([2, 6], dtype=torch.int32)
    logits = f(1, 16).expand(5, 16)
    assert torch.equal(
        kimi_ops.topk_gate(logits, 3).indices, kimi_ops.topk_gate(logits.contiguous(), 3).indices
    )
    calls = [
        (kimi_ops.grouped_gemm, (one.expand(6, 8), f(2, 8, 5), ends)),
        (kimi_ops.grouped_gemm, (f(6, 8), one.expand(2, 8, 5), ends)),
        (kimi_ops.grouped_gemm, (f(6, 1)[:1].expand(6, 1), f(2, 1, 5), ends)),
        (kimi_ops.grouped_gemm_wgrad, (f(6, 8), one.expand(6, 5), ends)),
        (kimi_ops.permute, (f(1, 6).expand(4, 6), PLAN)),
        (kimi_ops.unpermute, (f(1, 6).expand(8, 6), PLAN)),
        (kimi_ops.attention_max_logits, (one.expand(1, 2, 3, 4), f(1, 2, 3, 4), 1.0)),
        (kimi_ops.symmetric_matmul, (one.expand(3, 3), one.expand(3, 3))),
    ]
    for op, arguments in calls:
        dense = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments]
        assert torch.equal(op(*arguments), op(*dense)), op


def _ends_well(code):
    """Whether a process of its own runs the code to its end, or refuses an argument."""
    prelude = "import numpy as np, tempfile, threading, torch, kimi_ops\nfrom kimi_ops import _C\n"
    result = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True)
    if result.returncode == 0:
        return "wrong" not in result.stdout
    last = result.stderr.splitlines()[-1:] or [""]  # a signal says nothing
    return last[0].startswith(("TypeError: ", "ValueError: "))


def test_tensors_of_many_dimensions():
    assert _ends_well("""
x = torch.ones((1,) * 12)
update = torch.ops.kimi_ops.muon_momentum_([x], [x.clone()], 0.9, False, False, None, [])
print("" if update.shape == (1,) else "wrong")
""")


def test_lists_made_on_the_way():
    code = "x, edges = torch.zeros(50).double(), [n // 2 for n in range(1, 101)]\n"
    code += "made = (torch.full((1000,), float(n)) for n in range(50))\n"
    code += "_C.squares_(x, made, edges, [1000] * 50)\n"
    code += "print('' if x.equal(torch.arange(50.0).double() ** 2 * 1000) else 'wrong')"
    assert _ends_well(code)


def test_lists_that_change_during_the_call():
    assert _ends_well("""
class Changes:
    def __dlpack__(self, **options):
        tensors[0] = None
        junk.extend(torch.full((1000,), 7.0) for _ in range(50))
        return np.ones(1000, np.float32).__dlpack__(**options)
junk, tensors = [], [torch.full((1000,), 2.0), Changes()]
sums = torch.zeros(2).double()
_C.squares_(sums, tensors, [0, 1, 1, 2], [1000, 1000])
print("" if sums.tolist() == [4000, 1000] else "wrong")
""")


def test_a_read_only_mapping_is_refused():
    assert _ends_well("""
with tempfile.NamedTemporaryFile() as file:
    np.zeros(4, np.float32).tofile(file.name)
    bias = np.memmap(file.name, np.float32, "r")
    _C.update_expert_bias_(bias, np.arange(4, dtype=np.int32), 0.1, False)
""")


@pytest.mark.parametrize("op", ["permute", "unpermute"])
def test_a_plan_that_leads_outside(op):
    maps = "(torch.tensor(x, dtype=torch.int32) for x in ([[10**9]], [0], [1], [1]))"
    plan = f"kimi_ops.PermutePlan(*{maps})"
    assert _ends_well(f"kimi_ops.{op}(torch.ones(1, 4), {plan})")


def test_sources_and_ids_that_lead_outside_are_not_followed():
    rows = C.permute(f(4, 6), PLAN.row_map, torch.full_like(PLAN.source, 10**9))
    assert rows.shape == (8, 6)
    grad = C.topk_gate_backward(f(1, 2), f(1, 8), i([10**9, -(10**9)]), "sigmoid", True, 1.0)
    assert not grad.any()


@pytest.mark.parametrize(
    ("k", "n", "left"), [(2**22 + 4, 2**40 - 2**20 + 1, 16), (2**22, 2**40 + 1, 2**24)]
)
@pytest.mark.parametrize("operators", [kimi_ops, kn], ids=["tensors", "arrays"])
def test_results_larger_than_any_memory(operators, k, n, left):
    """Their bytes wrap at 2^64 to a number that there is memory for."""
    assert 4 * k * n == 2**64 + left
    given = np.zeros((0, k), F32), np.zeros((0, n), F32), np.zeros(1, np.int32)
    if operators is kimi_ops:
        given = map(torch.from_numpy, given)
    message = (
        rf"^grouped_gemm_wgrad: expected results .* less than 2\^62 bytes, got .*{n}\] of float"
    )
    with pytest.raises(ValueError, match=message):
        operators.grouped_gemm_wgrad(*given)


def test_results_that_no_memory_is_left_for():
    a, dc = np.zeros((0, 2**30), np.float32), np.zeros((0, 2**25), np.float32)
    message = (
        rf"^grouped_gemm_wgrad: expected {2**57} bytes of memory .*float32, got none; free some"
    )
    with pytest.raises(MemoryError, match=message):
        kn.grouped_gemm_wgrad(a, dc, np.zeros(1, np.int32))
