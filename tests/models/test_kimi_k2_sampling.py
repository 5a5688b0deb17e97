# SPDX-License-Identifier: MIT
"""What generation code asks for: filters, padding, stops, streams, caches; against transformers."""

import pytest
import torch

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, LatentCache
from kimi_ops.models.kimi_k2.sampling import Sampling

transformers = pytest.importorskip("transformers")

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model() -> KimiK2:
    model = KimiK2(KimiK2Config.tiny()).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator).add_(float(parameter.dim() == 1))
    return model


@pytest.fixture(scope="module")
def other(model):
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "torch_dtype"):
        del values[name]
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**values)).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


FILTERS = {
    "top k": ({"top_k": 5}, [transformers.TopKLogitsWarper(5)]),
    "top p": ({"top_p": 0.6}, [transformers.TopPLogitsWarper(0.6)]),
    "min p": ({"min_p": 0.2}, [transformers.MinPLogitsWarper(0.2)]),
    "all": (
        {"top_k": 20, "top_p": 0.8, "min_p": 0.1},
        [
            transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.8),
            transformers.MinPLogitsWarper(0.1),
        ],
    ),
}


@pytest.mark.parametrize(("options", "warpers"), FILTERS.values(), ids=FILTERS.keys())
def test_filters_equal_transformers(options, warpers):
    logits = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    expected = transformers.TemperatureLogitsWarper(0.7)(None, logits.clone())
    for warper in warpers:
        expected = warper(None, expected)
    found = Sampling(temperature=0.7, **options).probabilities(logits)
    assert not bool((found > 0).all())
    found = found / found.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-5, atol=1e-6)


def test_the_repetition_penalty_equals_transformers(model, other):
    options = {"max_new_tokens": 25, "repetition_penalty": 1.3}
    theirs = other.generate(PROMPT, do_sample=False, pad_token_id=0, **options)
    ours = model.generate(PROMPT, **options)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, model.generate(PROMPT, max_new_tokens=25))


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths_equal_transformers(model, other, use_cache):
    theirs = other.generate(
        PROMPT, attention_mask=MASK, max_new_tokens=25, do_sample=False, pad_token_id=0
    )
    ours = model.generate(PROMPT, attention_mask=MASK, max_new_tokens=25, use_cache=use_cache)
    assert torch.equal(ours, theirs)
    alone = model.generate(PROMPT[1:, 2:], max_new_tokens=25)
    assert torch.equal(ours[1:, 2:], alone)
    penalty = {"max_new_tokens": 8, "repetition_penalty": 2.0}
    masked = model.generate(PROMPT, attention_mask=MASK, **penalty)
    assert torch.equal(masked[1:, 2:], model.generate(PROMPT[1:, 2:], **penalty))


@pytest.mark.parametrize("chunk", [1, 4, 5, 6, 100])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_a_prompt_in_pieces_gives_the_same(model, chunk, mask):
    options = {"max_new_tokens": 10, "attention_mask": mask}
    expected = model.generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, prefill_chunk=chunk, **options), expected)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_a_cache_goes_from_call_to_call(model, mask):
    cache = LatentCache(model.config, 2, 40)
    first = model.generate(PROMPT, max_new_tokens=5, attention_mask=mask, cache=cache)
    assert cache.length == 10  # of 11
    turn = torch.cat((first, PROMPT[:, :3]), dim=1)
    longer = None if mask is None else torch.cat((mask, torch.ones(2, 8, dtype=torch.int64)), 1)
    second = model.generate(turn, max_new_tokens=5, attention_mask=longer, cache=cache)
    assert torch.equal(second, model.generate(turn, max_new_tokens=5, attention_mask=longer))


def test_several_sequences_of_a_prompt(model):
    options = {"max_new_tokens": 12, "temperature": 2.0, "seed": 4}
    found = model.generate(PROMPT, attention_mask=MASK, num_return_sequences=3, **options)
    assert found.shape == (6, 18)
    assert torch.equal(found[:, :6], PROMPT.repeat_interleave(3, 0))
    assert len({tuple(row) for row in found.tolist()}) == 6
    plain = model.generate(
        PROMPT, attention_mask=MASK, num_return_sequences=3, use_cache=False, **options
    )
    assert torch.equal(found, plain)


def test_processors_see_ids_and_change_logits(model):
    seen = []

    def even(ids, logits):
        seen.append(ids.clone())
        return logits.masked_fill(torch.arange(64) % 2 == 1, -torch.inf)

    ids = model.generate(PROMPT, max_new_tokens=6, logits_processor=[even])
    assert bool((ids[:, 6:] % 2 == 0).all())
    assert [tuple(each.shape) for each in seen] == [(2, 6 + n) for n in range(6)]
    assert torch.equal(seen[-1], ids[:, :-1])


class Letters:
    """A tokenizer of 64 letters."""

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


def test_stop_strings_end_a_sequence(model):
    free = model.generate(PROMPT, max_new_tokens=12)
    texts = [Letters().decode(row) for row in free[:, 6:].tolist()]
    stop = texts[0][3:6]
    assert stop not in texts[1] and texts[0].index(stop) == 3
    options = {"max_new_tokens": 12, "tokenizer": Letters()}
    ids = model.generate(PROMPT, stop_strings=stop, pad_token_id=63, **options)
    assert torch.equal(ids[1], free[1])
    assert torch.equal(ids[0, :12], free[0, :12]) and ids[0, 12:].tolist() == [63] * 6
    other = model.generate(PROMPT, stop_strings=[stop, texts[1][:4]], **options)
    assert other.shape[1] == 12  # both have ended
    prompt = Letters().decode(PROMPT[0].tolist())
    assert torch.equal(model.generate(PROMPT[:1], stop_strings=[prompt], **options), free[:1])


def test_a_streamer_is_told_of_every_token(model):
    class Heard(list):
        def put(self, value):
            self.append(value)

        def end(self):
            self.append(None)

    heard = Heard()
    ids = model.generate(PROMPT, max_new_tokens=5, streamer=heard)
    assert heard.pop() is None
    assert torch.equal(torch.cat([heard[0], torch.stack(heard[1:], 1)], 1), ids)


def test_do_sample_is_understood(model):
    greedy = model.generate(PROMPT, max_new_tokens=9)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=9, do_sample=False), greedy)
    options = {"max_new_tokens": 9, "seed": 5}
    drawn = model.generate(PROMPT, do_sample=True, **options)
    assert torch.equal(drawn, model.generate(PROMPT, temperature=1.0, **options))
    assert torch.equal(drawn, model.generate(PROMPT, temperature=1.0, do_sample=True, **options))


def test_the_prompt_computes_one_row_of_logits(model, monkeypatch):
    rows = []
    head = model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    model.generate(PROMPT, max_new_tokens=4)
    head.remove()
    assert rows == [1] * 4


BAD = [
    ({"top_k": -1}, "top_k: expected an int >= 0, got -1"),
    ({"top_k": 1.5}, "top_k: expected an int >= 0"),
    ({"min_p": 1.5}, "min_p: expected 0 <= min_p <= 1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number > 0"),
    ({"num_return_sequences": 0}, "num_return_sequences: expected at least 1"),
    ({"prefill_chunk": 0}, "prefill_chunk: expected at least 1 token"),
    ({"do_sample": False, "temperature": 1.0}, "do_sample: expected True beside temperature 1.0"),
    ({"do_sample": True, "temperature": 0.0}, "do_sample: expected False beside temperature 0.0"),
    ({"stop_strings": "x"}, r"tokenizer: expected one beside stop_strings \['x'\], got None"),
    ({"stop_strings": ["x", ""], "tokenizer": Letters()}, "stop_strings: expected no empty"),
    ({"attention_mask": MASK.flip(1)}, "attention_mask: expected padding on the left"),
    ({"attention_mask": MASK * 0}, "attention_mask: expected padding on the left, and a token"),
    ({"attention_mask": MASK[:, 1:]}, r"attention_mask: expected shape \[2, 6\], got \[2, 5\]"),
    ({"cache": LatentCache(KimiK2Config.tiny(), 2, 9)}, "capacity: expected at most 9 more tokens"),
    ({"cache": LatentCache(KimiK2Config.tiny(), 1, 40)}, "batch: expected 1 sequences, got 2"),
    (
        {"cache": LatentCache(KimiK2Config.tiny(), 2, 40), "use_cache": False},
        "use_cache: expected True beside a cache",
    ),
    (
        {"cache": LatentCache(KimiK2Config.tiny(), 2, 40), "num_return_sequences": 2},
        "num_return_sequences: expected 1 beside a cache",
    ),
    ({"logits_processor": [lambda ids, logits: logits[:, 1:]]}, r"logits_processor: expected log"),
    ({"logits_processor": [lambda ids, logits: None]}, "logits_processor: .* got NoneType"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments_are_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **({"max_new_tokens": 5} | changes))


@torch.no_grad()
def test_a_cache_with_other_contents_is_refused(model):
    full, plain = LatentCache(model.config, 2, 40), LatentCache(model.config, 2, 40)
    model(PROMPT, cache=full)
    model(PROMPT[:, :3], cache=plain)
    with pytest.raises(ValueError, match="cache: expected fewer tokens than the 6 of input_ids, g"):
        model.generate(PROMPT, max_new_tokens=5, cache=full)
    with pytest.raises(ValueError, match="cache: expected one that was filled with a padding mask"):
        model.generate(PROMPT, max_new_tokens=5, cache=plain, attention_mask=MASK)
