# SPDX-License-Identifier: MIT
"""Steps that a CUDA graph repeats, on the CPU: what is repeated is a trace of the first one.

A trace, like a graph, has the numbers of the host as they were when it was made, and reads and
writes the tensors that it met; what looks at a value of a tensor cannot be traced.
"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, LatentCache, inputs
from kimi_ops.models.kimi_k2 import generate as generate_module
from kimi_ops.models.kimi_k2.decode_graphs import DecodeGraphs


class Traces:
    """In place of CUDA graphs: counts how many were made."""

    def __init__(self):
        self.made = 0

    def __call__(self, work):
        self.made += 1
        with pytest.MonkeyPatch.context() as patch:  # values of ids are looked at on a CPU alone
            patch.setattr(inputs, "_readable", lambda values: False)
            return make_fx(work)()


@pytest.fixture(scope="module")
def model() -> KimiK2:
    config = KimiK2Config.from_dict(
        {**KimiK2Config.tiny().to_dict(), "max_position_embeddings": 1024}
    )
    model = KimiK2(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.2, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_repeated_steps_equal_forwards(model, padded):
    ids = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[0, :5] = mask[2, :1] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    prompt = {"attention_mask": mask[:, :12], "position_ids": positions[:, :12]} if padded else {}
    caches = [LatentCache(model.config, 3, 300) for _ in range(2)]
    for cache in caches:
        model(ids[:, :12], cache=cache, **prompt)
    traces = Traces()
    graphs = DecodeGraphs(model, caches[0], traces)
    for t in range(12, 20):
        now = slice(t, t + 1)
        more = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, now]}
        expected = model(ids[:, now], cache=caches[1], **(more if padded else {}))[:, -1]
        found = graphs.step(ids[:, now], positions[:, now] if padded else None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert caches[0].length == caches[1].length == t + 1
    assert traces.made == 1
    torch.testing.assert_close(caches[0].entries[:, :, :20], caches[1].entries[:, :, :20])


@torch.no_grad()
def test_a_window_for_each_power_of_two(model):
    ids = torch.randint(0, 64, (1, 530), generator=torch.Generator().manual_seed(5))
    cache, traces = LatentCache(model.config, 1, 600), Traces()
    cache.entries.fill_(torch.nan)  # what memory may hold that nobody wrote
    model(ids[:, :254], cache=cache)
    graphs = DecodeGraphs(model, cache, traces)
    for t in range(254, 258):  # 255, 256 | 257, 258 tokens
        found = graphs.step(ids[:, t : t + 1])
    assert traces.made == 2
    torch.testing.assert_close(found, model(ids[:, :258])[:, -1], rtol=1e-4, atol=1e-5)
    cache.length = 600
    with pytest.raises(ValueError, match="LatentCache: capacity: expected at most 0 more"):
        graphs.step(ids[:, :1])


def test_generate_with_graphs_gives_the_same_ids(model, monkeypatch):
    traces = Traces()
    monkeypatch.setattr(generate_module, "CudaGraphs", lambda: traces)
    monkeypatch.setattr(generate_module, "_check_graph", lambda *_: None)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids).index_fill_(1, torch.arange(2), 0)
    mask[0] = 1
    options = {"max_new_tokens": 6, "attention_mask": mask, "seed": 1, "temperature": 0.8}
    options |= {"num_return_sequences": 2, "repetition_penalty": 1.2}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cuda_graph=True, **options), expected)
    assert traces.made == 1


def test_what_graphs_cannot_do_is_refused_before_the_prompt_is_computed(model, monkeypatch):
    monkeypatch.setattr(generate_module, "_prefill", None)
    ids = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="cuda_graph: expected a model on a CUDA device, got cpu"):
        model.generate(ids, max_new_tokens=1, cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_of_a_gpu_give_the_same_ids(model):
    there = KimiK2(model.config, device="cuda").eval()
    there.load_state_dict(model.state_dict())
    ids = torch.randint(1, 64, (2, 250), generator=torch.Generator().manual_seed(7)).cuda()
    expected = there.generate(ids, max_new_tokens=20, temperature=0.0)
    assert torch.equal(
        there.generate(ids, max_new_tokens=20, temperature=0.0, cuda_graph=True), expected
    )
