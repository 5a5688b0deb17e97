# SPDX-License-Identifier: MIT
"""One update: which gradient, at which rate, and what it leaves behind."""

import pytest
import torch

from kimi_ops.agentic.learner import Learner
from kimi_ops.models.kimi_k2 import KimiK2
from tests.agentic.agentic_parts import tiny

IDS = torch.arange(40, 80)[None]


def forward(model: KimiK2) -> torch.Tensor:
    return model(IDS).float().square().mean()


@pytest.fixture
def taken(monkeypatch):
    """The gradients that the optimizer is given."""
    found: list[dict[str, torch.Tensor]] = []

    def make(learner: Learner) -> Learner:
        step, named = learner.optimizer.step, dict(learner.model.named_parameters())

        def recorded():
            found.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
            step()

        monkeypatch.setattr(learner.optimizer, "step", recorded)
        return learner

    return found, make


def test_the_gradient_is_of_the_loss_and_of_the_balance(taken, monkeypatch):
    found, make = taken
    learner = make(Learner(tiny(), 1e-3))
    model = learner.model
    weight = model.lm_head.weight
    monkeypatch.setattr(model, "auxiliary_loss", lambda: 3 * weight.sum())
    told = [learner.step(lambda: forward(model), 1.0)]
    other = tiny().train()
    loss = forward(other)
    loss.backward()
    assert told == [float(loss.detach())]
    for name, parameter in other.named_parameters():
        more = 3.0 if name == "lm_head.weight" else 0.0
        if parameter.grad is not None:
            torch.testing.assert_close(found[0][name], parameter.grad + more)
    assert all(parameter.grad is None for parameter in model.parameters())  # for the next one


def test_the_rate_is_a_share_of_the_peak_and_only_adamw_is_clipped():
    learner = Learner(tiny(), 1e-3, tau=7.0, clip_norm=0.5)
    before = learner.model.lm_head.weight.detach().clone()
    learner.step(lambda: forward(learner.model), 0.25)
    groups = learner.optimizer.param_groups
    assert {group["lr"] for group in groups} == {0.25e-3}
    clipped = {(group["algorithm"], group["max_grad_norm"]) for group in groups}
    assert clipped == {("muon", None), ("adamw", 0.5)}
    assert learner.optimizer.qk_clip.tau == 7.0 and learner.model.training
    moved = (learner.model.lm_head.weight.detach() - before).abs()
    assert 0 < moved.max() < 1e-3
    usual = Learner(tiny(), 1e-3)
    assert usual.optimizer.qk_clip.tau == 100.0 and usual.bias_rate == 0.01
    assert {group["max_grad_norm"] for group in usual.optimizer.param_groups} == {None, 1.0}


@pytest.mark.parametrize("rate", [0.0, 0.03])
def test_the_bias_of_experts_moves_by_its_rate_towards_those_that_have_less(rate):
    learner = Learner(tiny().eval(), 1e-3, bias_rate=rate)
    moes = learner.model.moe_layers()
    before = [moe.gate.e_score_correction_bias.clone() for moe in moes]
    loads: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        found = forward(learner.model)
        loads.extend(moe.tokens_per_expert.float().clone() for moe in moes)
        return found

    learner.step(loss, 1.0)
    assert moes and all(load.sum() > 0 for load in loads)
    for moe, bias, load in zip(moes, before, loads, strict=True):
        moved = moe.gate.e_score_correction_bias - bias
        torch.testing.assert_close(moved, rate * (load.mean() - load).sign())
        assert moe.tokens_per_expert.sum() == 0  # of the next update
    assert all(bool((a.max_logits == -torch.inf).all()) for a in learner.model.attention_layers())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_updates_nothing(value):
    learner = Learner(tiny(), 0.01)
    before = [parameter.clone() for parameter in learner.model.parameters()]
    with pytest.raises(FloatingPointError, match=f"a finite loss, got {value}; lower the learning"):
        learner.step(lambda: torch.tensor(value), 1.0)
    assert all(map(torch.equal, before, learner.model.parameters()))
