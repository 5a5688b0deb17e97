# SPDX-License-Identifier: MIT
"""The latent cache and sampling."""

import copy
import dataclasses
from itertools import accumulate

import pytest
import torch

from kimi_ops.models.kimi_k2 import Attention, KimiK2, KimiK2Config, LatentCache
from kimi_ops.models.kimi_k2 import attention as attention_module
from kimi_ops.models.kimi_k2.rope import rotary_tables
from kimi_ops.models.kimi_k2.sampling import Sampling


@pytest.fixture(scope="module")
def model() -> KimiK2:
    model = KimiK2(KimiK2Config.tiny())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("pieces", [[1] * 12, [12], [5, 1, 1, 5], [1, 11], [7, 3, 2]], ids=str)
@torch.no_grad()
def test_logits_with_a_cache_equal_those_without(model, pieces):
    ids = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(8))
    expected = model(ids)
    cache = LatentCache(model.config, 3, 12)
    parts = [model(part, cache=cache) for part in ids.split(pieces, dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_the_cache_holds_one_latent_and_one_rotary_key_for_each_token():
    config = KimiK2Config.k2()
    cache = LatentCache(config, 1, 10, device="meta", dtype=torch.bfloat16)
    assert cache.nbytes == 10 * 70_272


def peak_allocation(run) -> int:
    """Largest sum of bytes that torch's CPU allocator held at once for `run`."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 3])
def test_decoding_never_expands_the_cache(new):
    values = {**KimiK2Config.tiny().to_dict(), "num_attention_heads": 32}
    values |= {"num_key_value_heads": 32, "max_position_embeddings": 4096}
    config = KimiK2Config.from_dict(values)
    attention = Attention(config, dtype=torch.bfloat16)
    cache = LatentCache(config, 1, 4096, dtype=torch.bfloat16)
    for tensor in (cache.entries, *attention.parameters()):
        tensor.normal_(0, 0.1)
    cache.length = 4000
    x = torch.randn(1, new, config.hidden_size).bfloat16()
    tables = rotary_tables(config, torch.arange(4000, 4000 + new))
    attention(x, *tables, cache, 0)
    # A copy for every head would be 32 times the layer's entries. A mask has a row for each head
    # and token, as bool and as the kernel's number.
    layer = cache.entries[0].nbytes
    mask = 0 if new == 1 else 32 * new * 4096 * (1 + 4)
    assert peak_allocation(lambda: attention(x, *tables, cache, 0)) < 3 * layer + mask


@torch.no_grad()
def test_blocks_of_queries_over_a_cache_change_nothing(model, monkeypatch):
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(9))
    expected = model(ids)
    monkeypatch.setattr(attention_module, "_MASK_ELEMENTS", 2 * 40 * 7)  # seven queries a block
    cache = LatentCache(model.config, 2, 40)
    parts = [model(part, cache=cache) for part in ids.split([10, 30], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_refuses_what_does_not_fit(model):
    cache = LatentCache(model.config, 2, 4)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    model(ids, cache=cache)
    before = cache.entries.clone()
    with pytest.raises(ValueError, match="at most 1 more tokens, got 3"):
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="2 sequences, got 1"):
        model(ids[:1, :1], cache=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="works without gradients"):
        model(ids[:, :1], cache=cache)
    assert cache.length == 3 and torch.equal(cache.entries[:, :, :3], before[:, :, :3])


@torch.no_grad()
def test_a_cache_of_another_dtype_or_device_is_refused(model):
    half, ids = copy.deepcopy(model).bfloat16(), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"dtype: expected the model's torch.bfloat16, got .*32"):
        half(ids, cache=LatentCache(model.config, 2, 4))
    with pytest.raises(ValueError, match="device: expected the model's cpu, got meta"):
        model(ids, cache=LatentCache(model.config, 2, 4, device="meta"))
    cache = LatentCache(model.config, 2, 8, dtype=torch.bfloat16)
    half(ids, cache=cache)
    assert half(ids, cache=cache).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=str)
def test_generation_with_a_cache_equals_recomputation(model, options):
    prompt = torch.tensor([[1, 2, 3], [9, 8, 7]])
    cached = model.generate(prompt, max_new_tokens=40, **options)
    plain = model.generate(prompt, max_new_tokens=40, use_cache=False, **options)
    assert cached.shape == (2, 43) and torch.equal(cached[:, :3], prompt)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=40, **options))
    assert model.training  # the mode is restored


def test_greedy_generation_takes_the_largest_logit(model):
    ids = model.generate(torch.tensor([[5]]), max_new_tokens=20)
    with torch.no_grad():
        assert torch.equal(model(ids)[0, :-1].argmax(-1), ids[0, 1:])


def test_greedy_generation_equals_transformers(model):
    transformers = pytest.importorskip("transformers")
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "torch_dtype"):
        del values[name]
    other = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**values)).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    theirs = other.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=30), theirs)


def test_seeds_and_generators(model):
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 20, "temperature": 1.5}
    first = model.generate(prompt, seed=1, **options)
    assert not torch.equal(first, model.generate(prompt, seed=2, **options))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(first, model.generate(prompt, generator=generator, **options))
    state = torch.get_rng_state()
    model.generate(prompt, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_end_token_ends_each_sequence(model):
    prompt = torch.tensor([[1, 2, 3], [9, 8, 7]])
    free = model.generate(prompt, max_new_tokens=10)
    end = int(free[0, 6])
    ended = model.generate(prompt, max_new_tokens=10, eos_token_id=end)
    for row, expected in zip(ended[:, 3:], free[:, 3:], strict=True):
        stop = (expected == end).nonzero()
        stop = int(stop[0]) if len(stop) else 10
        assert torch.equal(row[:stop], expected[: min(stop, len(row))])
        assert bool((row[stop:] == end).all())
    alone = model.generate(prompt[:1], max_new_tokens=10, eos_token_id=end)
    assert alone.shape[1] <= 7  # it stopped
    other = next(i for i in range(64) if i not in free)
    several = model.generate(prompt, max_new_tokens=10, eos_token_id=[end, other])
    assert torch.equal(several, ended)
    several = model.generate(prompt, max_new_tokens=10, eos_token_id=[other, end])
    assert torch.equal(several[0, : alone.shape[1]], alone[0])
    assert bool((several[0, alone.shape[1] :] == other).all())


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def chosen(logits, **options):
        return Sampling(generator=generator, **options).choose(logits, torch.zeros(len(logits), 0))

    def frequencies(**options):
        return chosen(logits, **options).bincount(minlength=4) / 40_000

    expected = (logits[0].double() / 0.7).softmax(-1)
    assert float((frequencies(temperature=0.7) - expected).abs().max()) < 0.01
    p = logits[0].double().softmax(-1)  # 0.0871, 0.2369, 0.6439, 0.0321
    kept = torch.tensor([0.0, p[1], p[2], 0.0]) / (p[1] + p[2])
    assert float((frequencies(temperature=1.0, top_p=0.7) - kept).abs().max()) < 0.01
    assert frequencies(temperature=1.0, top_p=0.64)[2] == 1.0
    assert frequencies(temperature=1.0, top_p=1e-9)[2] == 1.0
    assert chosen(torch.tensor([[1.0, 3.0, 3.0]])).tolist() == [1]


BAD_ARGUMENTS = [
    ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
    ({"max_new_tokens": 126}, "max_new_tokens: expected at most 125 after 3 tokens"),
    ({"temperature": -1.0}, "temperature: expected at least 0"),
    ({"temperature": float("nan")}, "temperature: expected at least 0"),
    ({"temperature": float("inf")}, "temperature: expected at least 0 and finite"),
    ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1"),
    ({"top_p": 1.1}, "top_p: expected 0 < top_p <= 1"),
    ({"seed": 1, "generator": torch.Generator()}, "seed: expected none beside a generator"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"input_ids: expected shape \[B, S\]"),
    ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids: expected shape \[B, S\]"),
    ({"input_ids": torch.full((1, 3), 64)}, r"ids in 0 \.\. 63"),
    ({"eos_token_id": [3, 64]}, r"generate: eos_token_id: expected ids in 0 \.\. 63.*\[3, 64\]"),
    ({"pad_token_id": -1}, r"generate: pad_token_id: expected ids in 0 \.\. 63"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS)
def test_bad_arguments(model, changes, message):
    arguments = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "max_new_tokens": 5, **changes}
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_the_end_token_of_the_config_is_used(model):
    prompt = torch.tensor([[1, 2, 3]])
    free = model.generate(prompt, max_new_tokens=10)
    plain = model.config
    try:
        model.config = dataclasses.replace(plain, eos_token_id=int(free[0, 5]))
        assert model.generate(prompt, max_new_tokens=10).shape[1] <= 6
    finally:
        model.config = plain
