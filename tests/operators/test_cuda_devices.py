# SPDX-License-Identifier: MIT
"""On a GPU a call runs on the current stream of its tensors' device, whichever device is current
and whichever thread calls."""

import threading

import pytest
import torch

import kimi_ops
from kimi_ops import _native

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native._C.cuda_architectures()),
    reason="no GPU, or a build without CUDA kernels",
)


def plans(device: str) -> list[torch.Tensor]:
    ids = torch.arange(4096, dtype=torch.int32, device=device).remainder_(7).view(-1, 2)
    return list(kimi_ops.permute_plan(ids, 7))


def same(found: list[torch.Tensor]) -> bool:
    wanted = plans("cpu")
    return all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


def test_work_is_queued_on_the_current_stream():
    ids = torch.zeros(2048, 2, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        ids.copy_(torch.arange(4096, device="cuda").remainder_(7).view(-1, 2))
        plan = kimi_ops.permute_plan(ids, 7)
        assert not stream.query(), "nothing waits for the device"
    stream.synchronize()
    assert same(list(plan))


def test_a_thread_that_never_used_the_gpu():
    found: list[list[torch.Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(plans("cuda")))
    thread.start()
    thread.join()
    assert same(found[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_of_another_device_than_the_current_one():
    with torch.cuda.device(0):
        found = plans("cuda:1")
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in found) and same(found)
    with pytest.raises(ValueError, match=r"expert_bias: expected on cuda:1 as logits, got cuda:0"):
        kimi_ops.topk_gate(
            torch.zeros(4, 8, device="cuda:1"), 2, expert_bias=torch.zeros(8, device="cuda:0")
        )
