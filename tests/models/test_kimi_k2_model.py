# SPDX-License-Identifier: MIT
"""The model against transformers' DeepseekV3, and its own invariants."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

transformers = pytest.importorskip("transformers")


def hf_config(config: KimiK2Config):
    """transformers' configuration of the same model."""
    values = config.to_dict()
    for name in ("model_type", "architectures", "torch_dtype"):
        del values[name]
    result = transformers.DeepseekV3Config(**values)
    result._attn_implementation = "eager"
    result._experts_implementation = "eager"
    return result


def randomize(model: KimiK2, seed: int = 0) -> None:
    """Large weights, random gains and router biases: no part may hide behind a neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.15, generator=generator)
        for moe in model.moe_layers():
            moe.gate.e_score_correction_bias.normal_(0, 0.2, generator=generator)


def to_transformers(model: KimiK2):
    """A DeepseekV3ForCausalLM with the weights of `model`; both keep experts stacked alike."""
    other = transformers.DeepseekV3ForCausalLM(hf_config(model.config))
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not unexpected
    return other


def variant(**changes) -> KimiK2Config:
    return KimiK2Config.from_dict({**KimiK2Config.tiny().to_dict(), **changes})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "tiny": {},
    "without yarn": {"rope_scaling": None},
    "groups": {"n_group": 4, "topk_group": 2},
    "no q latent": {"q_lora_rank": None},
    "two shared experts": {"n_shared_experts": 2},
    "raw weights": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "all layers sparse": {"first_k_dense_replace": 0},
    "biases": {"attention_bias": True},
    "wide values": {"v_head_dim": 32},
    "eps of later releases": {"rms_norm_eps": 1e-5},
    "rotary halves": {"rope_interleave": False},
    "yarn of its own growth": {"rope_scaling": YARN | {"attention_factor": 1.4, "truncate": False}},
    "mscale_all_dim alone": {"rope_scaling": YARN | {"mscale_all_dim": 1.0}},
    "linear positions": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3 positions": {"rope_scaling": LLAMA3},
    "every expert in spite of groups": {"n_group": 2, "num_experts_per_tok": 8},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_gradients_equal_transformers(changes):
    config = variant(**changes)
    model = KimiK2(config).eval()
    randomize(model)
    other = to_transformers(model).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (2, 48), generator=generator)

    ours, theirs = model(ids), other(ids).logits
    assert relative_error(ours, theirs) < 1e-5
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, expected[name].grad) < 1e-5, name


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def test_bfloat16_is_as_near_to_float32_as_transformers():
    model = KimiK2(KimiK2Config.tiny())
    randomize(model)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        exact = model(ids)
        other = to_transformers(model).to(torch.bfloat16)
        for moe, layer in zip(model.moe_layers(), other.model.layers[1:], strict=True):
            layer.mlp.gate.e_score_correction_bias = moe.gate.e_score_correction_bias.clone()
        error = relative_error(other(ids).logits, exact)
        assert relative_error(model.to(torch.bfloat16)(ids), exact) < 1.25 * error


def test_dtypes_that_no_op_serves_are_refused(tmp_path):
    config, message = (
        KimiK2Config.tiny(),
        "dtype: expected bfloat16, float16 or float32, got torch.f",
    )
    for dtype in (torch.float64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"KimiK2: {message}"):
            KimiK2(config, dtype=dtype)
    KimiK2(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(TypeError, match=f"KimiK2: {message}"):
        KimiK2.from_pretrained(tmp_path / "plain", dtype=torch.float64)
    wide = KimiK2(config).double()
    with pytest.raises(TypeError, match=f"KimiK2: {message}"):
        wide(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match=f"save_pretrained: {message}"):
        wide.save_pretrained(tmp_path / "wide")
    assert not (tmp_path / "wide").exists()
    for dtype in (torch.float16, torch.bfloat16):
        ids = torch.zeros(1, 2, dtype=torch.int64)
        assert KimiK2(config, dtype=dtype)(ids).dtype == dtype


def test_float32_buffers_survive_casts():
    model = KimiK2(KimiK2Config.tiny())
    randomize(model)
    biases = [moe.gate.e_score_correction_bias.clone() for moe in model.moe_layers()]
    model.to(torch.bfloat16)
    for moe, bias in zip(model.moe_layers(), biases, strict=True):
        assert torch.equal(moe.gate.e_score_correction_bias, bias)
        assert moe.tokens_per_expert.dtype == torch.int32
    assert all(a.max_logits.dtype == torch.float32 for a in model.attention_layers())
    assert model.lm_head.weight.dtype == torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        meta = KimiK2(KimiK2Config.tiny(), device="meta", dtype=dtype)
        assert meta.moe_layers()[0].gate.e_score_correction_bias.dtype == torch.float32
        meta.allocate("cpu")
        assert meta.moe_layers()[0].gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_are_reproducible_and_leave_torch_s_generator_alone(tied):
    config = variant(tie_word_embeddings=tied)
    state = torch.get_rng_state()
    first, second, other = KimiK2(config), KimiK2(config), KimiK2(config)
    other.init_weights(1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        neutral = value.dim() == 1
        assert torch.equal(value, other.state_dict()[name]) == neutral, name
    assert (first.lm_head.weight is first.model.embed_tokens.weight) == tied
    assert (
        abs(float(first.model.embed_tokens.weight.detach().std()) - config.initializer_range) < 2e-3
    )


def test_a_training_step_repeats_bit_for_bit():
    model = KimiK2(KimiK2Config.tiny())
    ids = torch.arange(60).view(2, 30)
    runs = []
    for _ in range(3):
        model.zero_grad()
        model.reset_statistics()
        loss = model(ids).logsumexp(-1).sum() + model.auxiliary_loss()
        loss.backward()
        counts = [moe.tokens_per_expert.clone() for moe in model.moe_layers()]
        runs.append([loss.detach(), *(p.grad.clone() for p in model.parameters()), *counts])
    for values in zip(*runs, strict=True):
        assert all(torch.equal(values[0], value) for value in values[1:])


def test_statistics_and_auxiliary_loss_of_training_forwards():
    config = variant(aux_loss_alpha=0.01)
    model = KimiK2(config)
    for attention in model.attention_layers():
        assert torch.isneginf(attention.max_logits).all()
        attention.track_max_logits = True
    ids = torch.arange(20).view(2, 10)
    model(ids)
    first = [a.max_logits.clone() for a in model.attention_layers()]
    model(ids[:, :1])  # smaller maxima: one visible key
    assert all(map(torch.equal, first, (a.max_logits for a in model.attention_layers())))
    assert all(int(m.tokens_per_expert.sum()) == 22 * 2 for m in model.moe_layers())
    model(ids[:, 1:])
    for moe in model.moe_layers():
        assert int(moe.tokens_per_expert.sum()) == 2 * ids.numel() * config.num_experts_per_tok
    assert all(torch.isfinite(a.max_logits).all() for a in model.attention_layers())
    loss = model.auxiliary_loss()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    # A perfectly even router has the loss alpha for each layer; a real one is near it.
    assert 0.5 < float(loss.detach()) / (0.01 * len(model.moe_layers())) < 2
    loss.backward()
    assert model.moe_layers()[0].gate.weight.grad.abs().sum() > 0

    before = [moe.tokens_per_expert.clone() for moe in model.moe_layers()]
    first = [a.max_logits.clone() for a in model.attention_layers()]
    model.generate(ids + 30, max_new_tokens=2)
    model.eval()(ids + 20)
    assert all(map(torch.equal, first, (a.max_logits for a in model.attention_layers())))
    assert float(model.auxiliary_loss()) == 0.0
    for moe, count in zip(model.moe_layers(), before, strict=True):
        assert torch.equal(moe.tokens_per_expert, count)
    model.reset_statistics()
    assert all(int(moe.tokens_per_expert.sum()) == 0 for moe in model.moe_layers())
    assert all(torch.isneginf(a.max_logits).all() for a in model.attention_layers())


def test_the_balance_loss_lets_go_of_its_graph():
    config = variant(aux_loss_alpha=0.01)
    model = KimiK2(config)
    model(torch.arange(20).view(2, 10))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(moe.balance_loss is None for moe in twin.moe_layers())
        assert all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))
    assert model.auxiliary_loss().requires_grad
    graph = weakref.ref(model.moe_layers()[0].balance_loss)
    model.reset_statistics()
    assert graph() is None and float(model.auxiliary_loss()) == 0


def test_a_forward_repeated_by_checkpointing_is_counted_once():
    model = KimiK2(variant(aux_loss_alpha=0.01))
    ids = torch.arange(20).view(2, 10)
    runs = []
    for plain in (True, False):
        model.zero_grad()
        model.reset_statistics()
        logits = model(ids) if plain else checkpoint(model, ids, use_reentrant=False)
        losses = [moe.balance_loss for moe in model.moe_layers()]
        (logits.logsumexp(-1).sum() + model.auxiliary_loss()).backward()
        assert losses == [moe.balance_loss for moe in model.moe_layers()]
        counts = [moe.tokens_per_expert.clone() for moe in model.moe_layers()]
        runs.append([*counts, *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *runs))


def test_hooks_of_the_embedding_are_called():
    model, seen = KimiK2(KimiK2Config.tiny()), []
    model.model.embed_tokens.register_forward_hook(lambda *call: seen.append(call[2].shape))
    model(torch.arange(6).view(2, 3))
    assert seen == [(2, 3, 32)]


def test_tracked_logits_equal_those_of_transformers():
    """The maxima, recomputed in fp64 from transformers' own q and k."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

    model = KimiK2(KimiK2Config.tiny())
    randomize(model)
    seen = []

    def record(attention, query, key, value, mask, scaling, **_):
        scores = (query.double() @ key.double().transpose(-1, -2)) * scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        seen.append(scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3)))
        return original(attention, query, key, value, mask, scaling, **_)

    original = module.eager_attention_forward
    other = to_transformers(model)
    ids = torch.arange(50).view(2, 25)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", record)
        other(ids)
        for attention in model.attention_layers():
            attention.track_max_logits = True
        model(ids)
    assert len(seen) == model.config.num_hidden_layers
    for attention, expected in zip(model.attention_layers(), seen, strict=True):
        torch.testing.assert_close(attention.max_logits, expected.float(), rtol=1e-5, atol=1e-5)


BAD_INPUT = [
    (torch.zeros(1, 4, dtype=torch.int32), TypeError, "input_ids: expected int64"),
    (torch.zeros(4, dtype=torch.int64), ValueError, r"input_ids: expected shape \[B, S\]"),
    (torch.zeros(1, 0, dtype=torch.int64), ValueError, r"input_ids: expected shape \[B, S\]"),
    (torch.tensor([[0, 64]]), ValueError, r"ids in 0 \.\. 63, got 0 \.\. 64"),
    (torch.tensor([[-1]]), ValueError, "ids in 0"),
    (torch.zeros(1, 129, dtype=torch.int64), ValueError, "at most 128 positions"),
]


@pytest.mark.parametrize(("ids", "error", "message"), BAD_INPUT)
def test_bad_input(ids, error, message):
    with pytest.raises(error, match=message):
        KimiK2(KimiK2Config.tiny())(ids)


def test_training_under_autocast_is_near_to_float32():
    model = KimiK2(KimiK2Config.tiny())
    ids = torch.arange(60).view(2, 30)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(ids)
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 1e-6 < relative_error(grads[1], grads[0]) < 0.05
