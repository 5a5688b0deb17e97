# SPDX-License-Identifier: MIT
"""The experts of transformers' models by this library: every class of them against its own eager
forward, four whole models, expert-parallel sentinels, training by MuonClip."""

import importlib
import pkgutil
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_ops import MuonClip, muon_param_groups
from kimi_ops.activations import of, situ, swiglu
from kimi_ops.interop import transformers as interop

transformers = pytest.importorskip("transformers")
EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 6, 16, 24, 2, 11


class TinyConfig:
    """Answers what any experts class asks of its configuration."""

    _experts_implementation = "eager"
    hidden_act = "silu"
    moe_latent_size = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name and "factor" not in name:
            return "silu"
        if "eps" in name:
            return 1e-6
        if "alpha" in name or "limit" in name or "scale" in name or "beta" in name:
            return 1.5
        if "expert" in name and "size" not in name and "per_tok" not in name:
            return EXPERTS
        if "intermediate" in name or "ffn" in name:
            return INNER
        if "per_tok" in name or "top_k" in name:
            return TOP_K
        return HIDDEN


def decorated() -> list[str]:
    """`model:class` of every experts class whose forward asks the registry, by source."""
    found = []
    for module in pkgutil.iter_modules(transformers.models.__path__):
        spec = importlib.util.find_spec(f"transformers.models.{module.name}")
        path = f"{spec.submodule_search_locations[0]}/modeling_{module.name}.py" if spec else ""
        try:
            with open(path) as file:
                lines = file.read().splitlines()
        except OSError:
            continue
        for line, following in zip(lines, lines[1:], strict=False):
            if line.startswith("@use_experts_implementation"):
                name = following.removeprefix("class ").split("(")[0]
                found.append(f"{module.name}:{name}")
    return found


@pytest.fixture(scope="module", autouse=True)
def registered():
    interop.register()
    interop.register()


def made(place: str) -> nn.Module:
    model, name = place.split(":")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch.manual_seed(0)
    experts = getattr(module, name)(TinyConfig())
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def route(count: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(count)[:TOP_K] for _ in range(tokens)])
    return ids, torch.rand(tokens, TOP_K)


def outcome(experts: nn.Module, way: str, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and every gradient."""
    experts.config._experts_implementation = way
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts(x, ids, weights)
    torch.manual_seed(1)
    leaves = [x, weights, *experts.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))]


@pytest.mark.parametrize("place", decorated())
def test_every_experts_class(place):
    experts = made(place)
    ids, weights = route(experts.num_experts)
    x = torch.randn(TOKENS, experts.down_proj.shape[2 if experts.is_transposed else 1])
    eager = outcome(experts, "eager", x, ids, weights)
    ours = outcome(experts, interop.NAME, x, ids, weights)
    for got, want in zip(ours, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) + 1e-7)


def test_the_list_holds_the_models_that_the_docs_name():
    places = decorated()
    assert len(places) > 30
    for name in ("deepseek_v3", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "nemotron_h"):
        assert any(place.startswith(f"{name}:") for place in places), name


def test_plain_gated_experts_are_one_op(monkeypatch):
    """And what is not plain is not taken for it."""
    calls = []
    real = interop.fused_experts
    monkeypatch.setattr(interop, "fused_experts", lambda *a, **k: calls.append(k) or real(*a, **k))
    fused = {}
    for name in (
        "deepseek_v3", "qwen3_moe", "mixtral", "deepseek_v4", "glm5_next", "hy_v4", "hy_v4_vl",
        "minimax_m3_vl", "inkling2", "inkling2_loop", "gpt_oss", "nemotron_h", "aria",
    ):  # fmt: skip
        place = next(place for place in decorated() if place.startswith(f"{name}:"))
        experts = made(place)
        calls.clear()
        x = torch.randn(TOKENS, experts.down_proj.shape[2 if experts.is_transposed else 1])
        outcome(experts, interop.NAME, x, *route(experts.num_experts))
        fused[name] = [call["activation"] for call in calls]
    limited = [swiglu(1.5)]
    assert fused == {
        "deepseek_v3": [of("silu")], "qwen3_moe": [of("silu")], "mixtral": [of("silu")],
        "deepseek_v4": limited, "glm5_next": limited, "hy_v4": limited, "hy_v4_vl": limited,
        "minimax_m3_vl": [swiglu(1.5, alpha=1.5, shift=1.0)],
        "inkling2": [situ(16.0, 16.0)], "inkling2_loop": [situ(16.0, 16.0)],
        "gpt_oss": [], "nemotron_h": [], "aria": [],
    }  # fmt: skip
    experts = made("mixtral:MixtralExperts")
    for act, name in ((nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), None)):
        experts.act_fn = act
        assert interop._fused_activation(experts) == (name and of(name)), act


@pytest.mark.parametrize("place", ["mixtral:MixtralExperts", "gpt_oss:GptOssExperts"])
def test_experts_of_other_ranks_add_nothing(place):
    """Sentinels as transformers' expert parallelism leaves them: the id `num_experts`, or more."""
    experts = made(place)
    ids, weights = route(EXPERTS)
    x = torch.randn(TOKENS, HIDDEN)
    away = torch.rand(TOKENS, TOP_K) < 0.4
    away[0] = True
    sentinel = torch.where(away, EXPERTS + ids % 3, ids)
    want = outcome(experts, "eager", x, ids, weights.masked_fill(away, 0.0))
    got = outcome(experts, interop.NAME, x, sentinel, weights)
    assert not got[0][0].any() and not got[2][away].any()
    want[2][away] = 0.0  # a weight of 0 has a gradient, an absent expert none
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


CONFIGS = {
    "DeepseekV3": dict(
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16, intermediate_size=48, n_group=1, topk_group=1, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "Qwen3Moe": dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=48,
    ),
    "Mixtral": dict(
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, intermediate_size=48,
    ),
    "GptOss": dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, intermediate_size=32,
    ),
}  # fmt: skip


def model_of(name: str, **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **CONFIGS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")._from_config(config, **more)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_forward_and_backward(name):
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    eager = model_of(name, experts_implementation="eager")
    ours = model_of(name, experts_implementation=interop.NAME)
    for model in (eager, ours):
        model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-5)
    gradients = dict(eager.named_parameters())
    for key, parameter in ours.named_parameters():
        want = gradients[key].grad
        if want is not None:
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-6, msg=key)


def test_a_model_that_runs_may_change_its_mind():
    model = model_of("Mixtral")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.set_experts_implementation(interop.NAME)
        assert model.config._experts_implementation == interop.NAME
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_and_autocast():
    """Products in bf16 where the weights are, or autocast says so; the dtype of the tokens back."""
    experts = made("mixtral:MixtralExperts")
    ids, weights = route(EXPERTS)
    x = torch.randn(TOKENS, HIDDEN)
    want = outcome(experts, "eager", x, ids, weights)[0]
    experts.config._experts_implementation = interop.NAME
    with torch.autocast("cpu", torch.bfloat16):
        cast = experts(x, ids, weights)
    assert cast.dtype == torch.float32
    experts.bfloat16()
    half = experts(x.bfloat16(), ids, weights.bfloat16())
    assert half.dtype == torch.bfloat16
    assert experts(x, ids, weights).dtype == torch.float32  # a norm in fp32 in front
    for got in (cast, half.float()):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("place", ["mixtral:MixtralExperts", "gpt_oss:GptOssExperts"])
def test_under_autocast_no_other_dtype_comes_between(place):
    """Tokens in fp32 beside bf16 weights become fp16, not bf16 first."""
    experts = made(place).bfloat16()
    ids, weights = route(experts.num_experts)
    x = torch.randn(TOKENS, HIDDEN)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        got = interop.experts_forward(experts, x, ids, weights)
    with torch.no_grad():
        want = interop.experts_forward(experts.half(), x.half(), ids, weights)
    assert got.dtype == torch.float32 and torch.equal(got, want.float())


def test_float64_models_are_served_as_they_are():
    experts = made("mixtral:MixtralExperts").double()
    ids, weights = route(EXPERTS)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    want = outcome(experts, "eager", x, ids, weights)[0]
    got = outcome(experts, interop.NAME, x, ids, weights)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_compiles_without_a_break():
    model = model_of("Mixtral", experts_implementation=interop.NAME).eval()
    experts = model.model.layers[0].mlp.experts
    x, (ids, weights) = torch.randn(TOKENS, 32), route(4)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids, weights), experts(x, ids, weights))


def trainer_of(folder: Any, **more: Any) -> Any:
    """transformers' Trainer over 16 random sequences, two passes of four steps."""
    pytest.importorskip("accelerate")
    ids = torch.randint(3, 64, (16, 17), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=2, logging_steps=1,
        learning_rate=0.03, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    return transformers.Trainer(args=arguments, train_dataset=data, **more)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_trainer_trains_by_muonclip(tmp_path, way):
    """The optimizer as an object or as a class; the Trainer's own schedule drives its rate."""
    model = model_of("Qwen3Moe", experts_implementation=interop.NAME)
    groups = muon_param_groups(model)
    more: dict[str, Any] = {"optimizers": (MuonClip(groups, lr=0.03), None)}
    if way == "optimizer_cls_and_kwargs":
        more = {way: (MuonClip, {"params": groups, "lr": 0.03})}
    trainer = trainer_of(tmp_path, model=model, **more)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"], rows
    assert rows[-1]["learning_rate"] < rows[0]["learning_rate"]
    inner = trainer.optimizer.optimizer
    assert isinstance(inner, MuonClip) and inner.param_groups[0]["lr"] == 0.0  # where it ended


def test_without_a_registry_the_error_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match="register: expected a transformers with a registry"):
        interop.register()
