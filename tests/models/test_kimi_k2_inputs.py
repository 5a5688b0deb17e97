# SPDX-License-Identifier: MIT
"""Padding, packed documents, labels and the other arguments of a forward, against transformers."""

import pytest
import torch

from kimi_ops import sequence_balance_loss
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, KimiK2Output, LatentCache
from kimi_ops.models.kimi_k2 import attention as attention_module

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 64, (3, 14), generator=torch.Generator().manual_seed(2))
LENGTHS = [14, 9, 4]
RIGHT = torch.tensor([[1] * n + [0] * (14 - n) for n in LENGTHS])
LEFT = RIGHT.flip(1)


def randomized() -> KimiK2:
    """Large weights: no part may hide behind a neutral value."""
    model = KimiK2(KimiK2Config.tiny())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15, generator=generator).add_(float(parameter.dim() == 1))
    return model


@pytest.fixture
def model() -> KimiK2:
    return randomized().eval()


@pytest.fixture
def other(model):
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "torch_dtype"):
        del values[name]
    config = transformers.DeepseekV3Config(**values)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    theirs = transformers.DeepseekV3ForCausalLM(config)
    assert theirs.load_state_dict(model.state_dict(), strict=False) == ([], [])
    return theirs.eval()


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [RIGHT, LEFT, LEFT.bool()], ids=["right", "left", "bool"])
@pytest.mark.parametrize("elements", [1 << 24, 3 * 2 * 14 * 5], ids=["whole", "five queries a run"])
def test_padding_equals_transformers(model, other, mask, elements, monkeypatch):
    monkeypatch.setattr(attention_module, "_MASK_ELEMENTS", elements)
    ours, theirs = model(IDS, attention_mask=mask), other(IDS, attention_mask=mask).logits
    near(ours[mask.bool()], theirs[mask.bool()])
    assert ours.isfinite().all()
    for row in range(len(LENGTHS)):  # as each sequence alone
        near(ours[row][mask[row].bool()], model(IDS[row : row + 1][:, mask[row].bool()])[0])


def test_gradients_with_padding_equal_transformers(model, other):
    labels = IDS.masked_fill(RIGHT == 0, -100)
    ours = model(IDS, attention_mask=RIGHT, labels=labels)
    theirs = other(IDS, attention_mask=RIGHT, labels=labels)
    near(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        near(parameter.grad, expected[name].grad)


def test_packed_documents_do_not_see_each_other(model, other):
    positions = torch.tensor([[*range(5), *range(2), *range(7)]])
    ours = model(IDS[:1], position_ids=positions)
    parts = [model(part) for part in IDS[:1].split([5, 2, 7], dim=1)]
    near(ours, torch.cat(parts, dim=1))
    mask = torch.zeros(1, 1, 14, 14, dtype=torch.bool)
    for start, end in ((0, 5), (5, 7), (7, 14)):
        mask[..., start:end, start:end] = True
    causal = mask & torch.ones(14, 14, dtype=torch.bool).tril()
    bias = torch.zeros(1, 1, 14, 14).masked_fill(~causal, torch.finfo(torch.float32).min)
    near(ours, other(IDS[:1], position_ids=positions, attention_mask=bias).logits)


def test_positions_that_only_start_later_change_nothing_else(model, other):
    positions = torch.arange(20, 34)[None]
    theirs = other(IDS, position_ids=positions.expand(3, -1)).logits
    near(model(IDS, position_ids=positions), theirs)
    near(model(IDS, position_ids=positions), model(IDS))  # rotary positions are relative


def test_outputs_on_request_equal_transformers(model, other):
    theirs = other(IDS, labels=IDS, output_hidden_states=True)
    ours = model(IDS, labels=IDS, output_hidden_states=True, output_router_logits=True)
    assert isinstance(ours, KimiK2Output)
    near(ours.logits, theirs.logits)
    near(ours.loss, theirs.loss)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    for mine, other_state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        near(mine, other_state)
    assert len(ours.router_logits) == 2
    for layer, logits in zip(other.model.layers[1:], ours.router_logits, strict=True):
        assert logits.shape == (42, layer.mlp.gate.weight.shape[0])
    first = model.model.layers[1]
    x = first.post_attention_layernorm(
        ours.hidden_states[1]
        + first.self_attn(first.input_layernorm(ours.hidden_states[1]), *tables(model, 14))
    )
    near(ours.router_logits[0], x.flatten(0, 1) @ first.mlp.gate.weight.T)
    plain = model(IDS, return_dict=True)
    assert plain.loss is None and plain.hidden_states is None and plain.router_logits is None
    assert torch.equal(plain.logits, model(IDS))


def tables(model, length):
    from kimi_ops.models.kimi_k2.rope import rotary_tables

    return rotary_tables(model.config, torch.arange(length))


def test_embeddings_and_last_logits(model):
    expected = model(IDS)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(IDS)), expected)
    near(model(IDS, logits_to_keep=2), expected[:, -2:])
    assert model(IDS, logits_to_keep=1).shape == (3, 1, 64)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[14], [9, 5], [6] + [1] * 8, [6, 1, 7]], ids=str)
def test_a_cache_remembers_its_padding(model, pieces):
    expected = model(IDS, attention_mask=LEFT)
    cache, parts = LatentCache(model.config, 3, 16), []
    for ids, mask in zip(IDS.split(pieces, 1), LEFT.split(pieces, 1), strict=True):
        parts.append(model(ids, attention_mask=mask, cache=cache))
    near(torch.cat(parts, 1)[LEFT.bool()], expected[LEFT.bool()])
    more = model(IDS[:, :1], cache=cache)  # no mask: a token
    whole = torch.cat((LEFT, torch.ones(3, 1, dtype=torch.int64)), 1)
    near(more, model(torch.cat((IDS, IDS[:, :1]), 1), attention_mask=whole)[:, -1:])


@torch.no_grad()
def test_a_mask_of_all_tokens_so_far_is_taken_beside_a_cache(model):
    cache = LatentCache(model.config, 3, 14)
    model(IDS[:, :10], attention_mask=LEFT[:, :10], cache=cache)
    near(
        model(IDS[:, 10:], attention_mask=LEFT, cache=cache),
        model(IDS, attention_mask=LEFT)[:, 10:],
    )


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_statistics_of_training_leave_padding_out(model, mask):
    model.train()
    for attention in model.attention_layers():
        attention.track_max_logits = True
    model(IDS, attention_mask=mask)
    moe, attention = model.moe_layers()[0], model.attention_layers()[1]
    loads, balance = moe.tokens_per_expert.clone(), moe.balance_loss
    largest = attention.max_logits.clone()
    assert int(loads.sum()) == sum(LENGTHS) * model.config.num_experts_per_tok
    model.reset_statistics()
    losses = []
    for row in range(3):
        model(IDS[row : row + 1][:, mask[row].bool()])
        losses.append(moe.balance_loss)
    assert torch.equal(moe.tokens_per_expert, loads)
    near(attention.max_logits, largest)
    near(balance, torch.stack(losses).mean())


def test_the_balance_loss_of_a_batch_is_over_its_tokens(model):
    moe = model.train().moe_layers()[0]
    moe.per_sequence = False
    x = torch.randn(3, 14, 32)
    moe(x, RIGHT.bool())
    logits, gate, _ = moe.gate(x[RIGHT.bool()])
    expected = sequence_balance_loss(logits, gate.indices, coefficient=model.config.aux_loss_alpha)
    near(moe.balance_loss, expected)


BAD = [
    ({"input_ids": None}, ValueError, "input_ids: expected ids or inputs_embeds, got neither"),
    ({"inputs_embeds": torch.zeros(3, 14, 32)}, ValueError, "inputs_embeds, got both"),
    (
        {"input_ids": None, "inputs_embeds": torch.zeros(3, 14, 31)},
        ValueError,
        r"inputs_embeds: expected shape \[B, S, 32\], got \[3, 14, 31\]",
    ),
    ({"attention_mask": RIGHT[:, 1:]}, ValueError, r"attention_mask: expected shape \[3, 14\]"),
    ({"attention_mask": RIGHT[:, None, None]}, ValueError, "attention_mask: expected shape"),
    ({"attention_mask": RIGHT.float()}, TypeError, "attention_mask: expected bool or int64, got"),
    ({"attention_mask": RIGHT * 2}, ValueError, "attention_mask: expected 0 and 1, got other"),
    ({"position_ids": torch.arange(13)[None]}, ValueError, r"position_ids: expected shape \[3, 14"),
    ({"position_ids": torch.arange(14.0)[None]}, TypeError, "position_ids: expected int64"),
    ({"position_ids": torch.arange(120, 134)[None]}, ValueError, "position_ids: expected 0 .. 127"),
    (
        {"labels": IDS[:, 1:]},
        ValueError,
        r"labels: expected int64 \[3, 14\], got torch.int64 \[3, ",
    ),
    ({"labels": IDS.int()}, ValueError, "labels: expected int64"),
    ({"labels": IDS, "logits_to_keep": 1}, ValueError, "logits_to_keep: expected 0 beside labels"),
    ({"logits_to_keep": -1}, ValueError, "logits_to_keep: expected an int >= 0, got -1"),
    ({"past_key_values": None}, TypeError, "past_key_values"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments_are_named(model, changes, error, message):
    with pytest.raises(error, match=message):
        model(**({"input_ids": IDS} | changes))
