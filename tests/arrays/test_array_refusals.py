# SPDX-License-Identifier: MIT
"""What ops on arrays refuse before a kernel sees it, and what they take though it looks odd."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kimi_ops.numpy as kn

ROOT = Path(__file__).resolve().parents[2]
LOGITS = np.arange(12, dtype=np.float32).reshape(3, 4)
SQUARE, WIDE = np.eye(3, dtype=np.float32), np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    "error, text, call",
    [
        (ValueError, r"mask: expected shape \[4\], got \[1\]",
         lambda: kn.topk_gate(LOGITS, 2, mask=np.array([True]))),
        (ValueError, r"mask: expected shape \[3, 4\], got \[3, 1\]",
         lambda: kn.topk_gate(LOGITS, 2, mask=np.ones((3, 1), bool))),
        (TypeError, "mask: expected bool, got float64",
         lambda: kn.topk_gate(LOGITS, 2, mask=np.full(4, 0.5))),
        (TypeError, "ids: expected an array, got list",
         lambda: kn.topk_gate(LOGITS, ids=[[1], [2], [3]])),
        (ValueError, r"logits.shape\[1\]: expected 1..1024, got 0",
         lambda: kn.topk_gate(np.zeros((2, 3, 0), np.float32), 1)),
        (ValueError, "restarts: expected 'auto' or steps, got 'never'",
         lambda: kn.newton_schulz(SQUARE, restarts="never")),
        (ValueError, "restarts: expected 'auto' or steps, got 2",
         lambda: kn.newton_schulz(SQUARE, method="gram", dtype="float32", restarts=2)),
        (ValueError, "restarts: only method 'gram' has any",
         lambda: kn.newton_schulz(SQUARE, restarts=[2])),
        (ValueError, "restarts: expected ascending steps from 1 to 4",
         lambda: kn.newton_schulz(SQUARE, method="gram", dtype="float32", restarts=[3, 2])),
        (ValueError, r"symmetric_matmul: a: expected \[..., m, m\], got shape \(3, 4\)",
         lambda: kn.symmetric_matmul(WIDE, WIDE.T)),
        (ValueError, r"syrk: a: expected \[..., m, n\], got shape \(4,\)",
         lambda: kn.syrk(WIDE[0])),
    ],
)  # fmt: skip
def test_what_is_refused(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_one_row_has_any_stride():
    plan = kn.permute_plan(np.zeros((3, 2), np.int32), 2, num_out_tokens=1)
    row = np.broadcast_to(np.arange(4, dtype=np.float32), (1, 4))
    assert row.strides[0] == 0
    assert np.array_equal(kn.unpermute(row, plan)[0], row[0])


def test_a_traced_call_leaves_the_number_of_threads_to_openmp():
    code = """
import ctypes
from kimi_ops._library import _C
openmp = ctypes.CDLL("libgomp.so.1")
openmp.omp_set_num_threads(3)
attributes = {"threads": 3, "coefficient": 0.1}
results = [([], "float32"), ([2], "float32"), ([], "int32")]
_C.xla_traced("z_loss", False, [([2, 4], "float32"), ([0], "float32")], results, attributes)
openmp.omp_set_num_threads(2)
print(_C.num_threads())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT / "python"), "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert result.stdout.split() == ["2"], result.stderr


@pytest.mark.parametrize("rows, columns", [(0, 8), (0, 256), (3, 0)])
def test_stored_forms_of_no_element(rows, columns):
    x, stack = np.zeros((rows, columns), np.float32), np.zeros((2, rows, columns), np.float32)
    forms = (
        kn.Fp8Rows.quantize(x),
        kn.Fp8BlockWeight.quantize(stack),
        kn.Int4GroupWeight.quantize(stack),
    )
    for form, shape in zip(forms, (x.shape, stack.shape, stack.shape), strict=True):
        assert form.shape == form.dequantize().shape == shape
