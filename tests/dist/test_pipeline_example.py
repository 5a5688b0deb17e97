# SPDX-License-Identifier: MIT
"""examples/12_pipeline.py and the stages that it is made of: the bits of one process."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from kimi_ops import MuonClip, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, Stage
from tests.dist.world import alone, torchrun

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples/12_pipeline.py")
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def told(text: str) -> dict[str, str]:
    """What a run prints of each step."""
    lines = re.findall(r"^step (\d+) loss ([\d.]+) balance ([\d.]+)$", text, re.MULTILINE)
    return {step: f"{loss} {balance}" for step, loss, balance in lines}


@pytest.mark.slow
def test_two_stages_have_the_bits_of_one_process(tmp_path: Path):
    alone_folder, staged_folder = tmp_path / "alone", tmp_path / "staged"
    single = told(alone(tmp_path, EXAMPLE, "--steps", "5", "--save", str(alone_folder)))
    staged = told(torchrun(2, EXAMPLE, "--steps", "5", "--save", str(staged_folder)))
    assert list(single) == ["0", "1", "2", "3", "4"] and staged == single
    assert float(single["4"].split()[0]) < 0.85 * float(single["0"].split()[0])
    for name in ("config.json", "model.safetensors"):
        assert (alone_folder / name).read_bytes() == (staged_folder / name).read_bytes()


def parts(**ways) -> list[Stage]:
    return [Stage(KimiK2(KimiK2Config.tiny()), layers) for layers in (range(2), range(2, 3))]


def test_stages_have_the_gradients_and_the_names_of_the_whole():
    model, stages = KimiK2(KimiK2Config.tiny()), parts()
    (model(IDS).logsumexp(-1).sum() + model.auxiliary_loss()).backward()
    logits = stages[1](stages[0](IDS))
    logits.logsumexp(-1).sum().backward()  # the balance losses come along
    whole = dict(model.named_parameters())
    named = [pair for stage in stages for pair in stage.named_parameters()]
    assert [name for name, _ in named] and {name for name, _ in named} == set(whole)
    assert all(torch.equal(p.grad, whole[name].grad) for name, p in named)
    found = sum(stage.auxiliary_loss() for stage in stages)
    torch.testing.assert_close(found, model.auxiliary_loss().detach())
    assert not found.requires_grad
    router = "model.layers.1.mlp.gate.weight"
    stages[0].zero_grad()
    with torch.no_grad():
        hidden = stages[0](IDS)
    assert stages[1](hidden).shape == (2, 9, 64) and whole[router].grad.norm() > 0
    for stage in stages:
        MuonClip(muon_param_groups(stage)).step()
        stage.reset_statistics()
        assert float(stage.auxiliary_loss()) == 0


def test_balance_losses_alone_reach_the_routers():
    """The gradient of a stage's output is zero: what is left is that of its balance losses."""
    first = parts()[0]
    out = first(IDS)
    out.backward(torch.zeros_like(out))
    model = KimiK2(KimiK2Config.tiny())
    model(IDS)
    model.moe_layers()[0].balance_loss.backward()
    router = model.moe_layers()[0].gate.weight.grad
    assert router.norm() > 0 and torch.equal(first.moe_layers()[0].gate.weight.grad, router)


def test_a_stage_without_memory_gets_some():
    config = dataclasses.replace(KimiK2Config.tiny(), aux_loss_alpha=0.01)
    stage = Stage(KimiK2(config, device="meta"), range(1, 3))
    stage.allocate("cpu")
    whole = KimiK2(config).state_dict()
    stage.load_state_dict({name: whole[name] for name in stage.state_dict()})
    x = torch.randn(1, 4, config.hidden_size, generator=torch.Generator().manual_seed(0))
    stage.train()(x).sum().backward()
    assert stage.auxiliary_loss() > 0


def test_what_cannot_be_a_stage_is_refused():
    model = KimiK2(KimiK2Config.tiny())
    for layers in (range(0), range(1, 4), range(0, 3, 2)):
        with pytest.raises(
            ValueError, match="Stage: layers: expected a range of neighbours among the 3"
        ):
            Stage(model, layers)
    tied = dataclasses.replace(model.config, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="Stage: model: expected an embedding and a head of their"):
        Stage(KimiK2(tied, device="meta"), range(2))
    stage = parts()[1]
    with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \[B, S, 32\]"):
        stage(torch.zeros(2, 3, 7))
