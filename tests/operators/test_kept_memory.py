# SPDX-License-Identifier: MIT
"""Large results on the CPU: the memory of one that is gone is used again, within bounds."""

import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.measure import kept_memory, peak_memory
from kimi_ops import fused_experts, grouped_gemm_wgrad, permute, permute_plan, release_kept_memory

MIB = 1 << 20


def large(mib: int, value: float = 1.0) -> Tensor:
    """A result of so many MiB, each element `value`."""
    left, right = torch.full((1, 256 * mib), value), torch.ones(1, 1024)
    return grouped_gemm_wgrad(left, right, torch.ones(1).int())[0]


@pytest.fixture(autouse=True)
def nothing_kept():
    release_kept_memory()
    yield
    release_kept_memory()


def test_memory_is_used_again_when_its_tensor_is_gone():
    first = large(16, 2.0)
    address, row = first.data_ptr(), first[0, 5]
    second = large(16, 3.0)
    assert second.data_ptr() != address
    del first
    third = large(16, 4.0)
    assert third.data_ptr() not in (address, second.data_ptr()), "a view is in use still"
    assert (row == 2.0).all() and (second == 3.0).all() and (third == 4.0).all()
    del row
    assert large(15, 5.0).data_ptr() == address
    del second, third
    release_kept_memory()
    large(16)
    large(13)  # not in the memory of 16, of which more than an eighth would lie idle
    assert release_kept_memory() == 13 * MIB


def test_gradients_and_working_memory_are_used_again():
    x = torch.randn(600, 512).bfloat16()
    w = [torch.randn(8, 2048, 512).bfloat16(), torch.randn(8, 512, 1024).bfloat16()]
    weights, ids = torch.rand(600, 2), torch.randint(8, (600, 2)).int()

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (x, *w)]
        fused_experts(*leaves, weights, ids).float().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    before = gradients()
    expected = [g.clone() for g in before]
    places = {g.data_ptr() for g in before if g.nbytes >= 8 * MIB}
    assert len(places) == 2
    del before
    again = gradients()
    assert {g.data_ptr() for g in again if g.nbytes >= 8 * MIB} == places
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_never_more_than_was_in_use_at_one_time():
    rng = random.Random(0)
    for _ in range(3):
        release_kept_memory()
        live: list[Tensor] = []
        most = 0
        for _ in range(20):
            if live and rng.random() < 0.5:
                live.pop(rng.randrange(len(live)))
            else:
                live.append(large(rng.choice((8, 9, 12, 16, 24))))
            # a kept block may be an eighth larger than what lies in it
            most = max(most, sum(t.nbytes for t in live) * 9 // 8)
        live.clear()
        assert 0 < release_kept_memory() <= most


def test_small_results_are_left_to_the_allocator():
    large(7)
    assert release_kept_memory() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its pages")
def test_the_kernel_may_take_what_is_kept():
    def lazy() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("LazyFree:"))

    result = large(64)
    before = lazy()
    del result
    assert lazy() - before >= 48 * MIB  # others' pages may go meanwhile
    assert (large(64, 3.0) == 3.0).all()
    assert release_kept_memory() == 64 * MIB


def test_threads_never_share_memory():
    wrong: list[int] = []

    def work(value: int) -> None:
        for step in range(10):
            mine = large(8, float(value * 100 + step))
            if not (mine == float(value * 100 + step)).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arrays_of_numpy_too():
    plan = permute_plan(torch.arange(8).int().view(8, 1), 8)
    x = np.ones((8, 1 << 20), np.float32)
    first = permute(x, plan)
    address = first.ctypes.data
    del first
    second = permute(2 * x, plan)
    assert second.ctypes.data == address and (np.asarray(second) == 2.0).all()


def test_a_measurement_sees_all_of_it():
    large(16)
    assert peak_memory(lambda: (large(16), None)[1], "cpu") >= 16 * MIB
    assert kept_memory(lambda: (large(16), None)[1], "cpu") < MIB
    assert kept_memory(lambda: large(16), "cpu") >= 16 * MIB
