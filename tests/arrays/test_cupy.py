# SPDX-License-Identifier: MIT
"""`kimi_ops.numpy` on CuPy's arrays gives what it gives on NumPy's; `test_gpu_arrays` says it of a
library that stands in for CuPy."""

import numpy as np
import pytest

import kimi_ops.numpy as kn
from kimi_ops._library import _C
from tests.arrays.cases import CASES
from tests.arrays.test_array_results import same
from tests.arrays.test_gpu_arrays import STORED

cupy = pytest.importorskip("cupy", reason="no CuPy", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    not (cupy.is_available() and _C.cuda_architectures()),
    reason="no GPU, or a build without CUDA kernels",
)
TOLERANCE = 2e-3  # products of float32 by tensor cores


@pytest.mark.parametrize("name", [name for name in CASES if not STORED.match(name)])
@pytest.mark.parametrize("own_stream", [False, True])
def test_cases_on_cuda(name, own_stream):
    case = CASES[name]
    with cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null:
        given = {key: cupy.asarray(value) for key, value in case.inputs.items()}
        ours = on_host(case.function(kn, **given))
    theirs = case.function(kn, **{key: value.copy() for key, value in case.inputs.items()})
    same(ours, theirs, max(case.tolerance, TOLERANCE))


def test_nothing_waits_on_cuda():
    """The call comes back before what the stream has to do first is done."""
    with cupy.cuda.Stream(non_blocking=True) as stream:
        logits = cupy.random.standard_normal((8192, 384), cupy.float32)
        for _ in range(200):
            logits = cupy.sin(logits) + cupy.cos(logits)
        gate = kn.topk_gate(logits, 8)
        assert not stream.done
        stream.synchronize()
    want = kn.topk_gate(logits.get(), 8)
    assert np.array_equal(gate.indices.get(), want.indices)


def on_host(tree):
    if isinstance(tree, (tuple, list)):
        return [on_host(one) for one in tree]
    assert type(tree) is cupy.ndarray
    return tree.get()
