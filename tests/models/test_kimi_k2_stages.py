# SPDX-License-Identifier: MIT
"""A stage of a whole checkpoint: its own tensors are read and checked, those of others are not; its
weights, drawn or spread over ranks, are those of the whole model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_ops import LocalWorld
from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2, KimiK2Config, Stage, load_stage, pretrained

CONFIG = KimiK2Config.tiny()
LAYERS = range(2), range(2, 3)
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in many files."""
    KimiK2(CONFIG).save_pretrained(tmp_path, max_shard_bytes=20_000)
    return tmp_path


def file_of(folder: Path, name: str) -> Path:
    return next(path for path in folder.glob("model-*") if name in load_file(path))


def change(folder: Path, name: str, **added: torch.Tensor) -> None:
    """Put tensors beside one, and into the index."""
    path = file_of(folder, name)
    save_file({**load_file(path), **added}, path)
    index = folder / "model.safetensors.index.json"
    entries = "".join(f'"{other}": "{path.name}", ' for other in added)
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{{entries}', 1))


def test_stages_of_a_checkpoint_are_its_parts(folder: Path):
    stages = [load_stage(folder, layers) for layers in LAYERS]
    whole = KimiK2(CONFIG)
    parts = {name: value for stage in stages for name, value in stage.state_dict().items()}
    assert parts.keys() == whole.state_dict().keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.state_dict().items())
    assert torch.equal(stages[1](stages[0](IDS)), whole(IDS))
    with pytest.raises(ValueError, match="save_pretrained: stages: expected a group with a rank"):
        stages[0].save_pretrained(folder / "part")
    assert not (folder / "part").exists()
    half = load_stage(folder, LAYERS[1], dtype=torch.bfloat16, micro_batches=4)
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.micro_batches == 4


def test_a_stage_asks_for_its_own_files_alone(folder: Path):
    own = file_of(folder, "model.layers.2.self_attn.o_proj.weight")
    change(
        folder, "model.layers.0.self_attn.o_proj.weight", **{"model.layers.0.odd": torch.ones(1)}
    )
    last = load_stage(folder, LAYERS[1])
    with pytest.raises(ValueError, match=r"only tensors of the model, .* with model.layers.0.odd;"):
        load_stage(folder, LAYERS[0])
    for path in folder.glob("model-*"):
        mine = any(name.startswith(last.prefixes) for name in load_file(path))
        if not mine:
            path.unlink()
    again = load_stage(folder, LAYERS[1])
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), last.parameters(), strict=True)
    )
    own.unlink()
    with pytest.raises(ValueError, match=f"{own.name} as a whole safetensors file"):
        load_stage(folder, LAYERS[1])


def test_a_tensor_of_its_own_that_is_missing_is_named(tmp_path: Path):
    KimiK2(CONFIG).save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    del values["model.layers.2.input_layernorm.weight"]
    save_file(values, tmp_path / "model.safetensors")
    load_stage(tmp_path, LAYERS[0])
    with pytest.raises(ValueError, match=r"without model.layers.2.input_layernorm.weight;"):
        load_stage(tmp_path, LAYERS[1])
    with pytest.raises(
        ValueError, match="Stage: layers: expected a range of neighbours among the 3"
    ):
        load_stage(tmp_path, range(2, 4))
    for wrong in ([0, 1], range(0), range(0, 3, 2)):
        with pytest.raises(ValueError, match="Stage: layers: expected a range of neighbours"):
            load_stage(tmp_path, wrong)
    with pytest.raises(ValueError, match=r"Stage: micro_batches: expected 1\.\."):
        load_stage(tmp_path, LAYERS[0], micro_batches=0)
    with pytest.raises(ValueError, match="experts: expected .* stored as fp8|multiple of 128"):
        load_stage(tmp_path, LAYERS[0], experts="fp8")


@pytest.mark.parametrize("seed", [0, 5])
def test_a_stage_draws_the_weights_of_the_whole(seed: int):
    whole = KimiK2(CONFIG)
    whole.init_weights(seed)
    for layers in LAYERS:
        stage = Stage(KimiK2(CONFIG, device="meta"), layers)
        stage.allocate("cpu")
        stage.init_weights(seed)
        state = whole.state_dict()
        assert all(torch.equal(state[name], value) for name, value in stage.state_dict().items())


def test_the_experts_of_a_stage_over_ranks(folder: Path):
    whole = KimiK2(CONFIG)
    wanted_logits = whole(IDS)
    (wanted_logits.logsumexp(-1).sum() + whole.auxiliary_loss()).backward()
    gradients = {name: p.grad for name, p in whole.named_parameters()}

    def work(group) -> None:
        with (
            ExpertRanks(group, CONFIG, max_tokens=18) as ranks,
            ExpertRanks(group, CONFIG, max_tokens=18) as others,
        ):
            first = load_stage(folder, LAYERS[0], expert_ranks=ranks)
            last = Stage(KimiK2(CONFIG, device="meta", expert_ranks=others), LAYERS[1])
            last.allocate("cpu")
            last.init_weights(0)
            stacks = first.moe_layers()[0].experts.gate_up_proj
            assert len(stacks) == CONFIG.n_routed_experts // 2
            logits = last(first(IDS))
            torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5)
            logits.logsumexp(-1).sum().backward()
            for stage in (first, last):
                for name, parameter in stage.named_parameters():
                    wanted = gradients[name]
                    if parameter in stage.expert_stacks():  # both ranks brought the same tokens
                        wanted = 2 * wanted[ranks.experts.start : ranks.experts.stop]
                    torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5)

    LocalWorld(2).run(work)


def test_quantised_experts_of_a_stage_are_for_inference():
    stage = Stage(KimiK2(CONFIG, device="meta"), LAYERS[1])
    pretrained.keep_quantized(pretrained.whole(stage), "int4")
    hidden = torch.zeros(1, 3, CONFIG.hidden_size)
    with pytest.raises(ValueError, match="experts: expected eval mode beside experts kept in int4"):
        stage.train()(hidden)


def test_a_tensor_that_is_no_stage_s_is_refused_by_all(tmp_path: Path):
    KimiK2(CONFIG).save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    save_file({**values, "model.extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for layers in LAYERS:
        with pytest.raises(ValueError, match="with model.extra.weight"):
            load_stage(tmp_path, layers)
