# SPDX-License-Identifier: MIT
"""Training over pipeline stages: the bits of one process, and with expert ranks or replicas its
losses; what does not go is refused by name, a rank that is lost or silent is named."""

import json
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kimi_ops.models.kimi_k2 import KimiK2Config, Stage
from kimi_ops.train import Diverged, PeerError, RankError, Ranks, checkpoint
from kimi_ops.train.metrics import read_metrics
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer
from tests.dist.test_train_ranks import HALF, STEPS, command, half_of, run, same, text, wait_for
from tests.dist.world import launch, started

# Three micro-batches, so that shares of them are rounded; the norm of AdamW's gradients is clipped.
WAYS = {"accumulate": 3, "clip_norm": 0.05}
STAGED = {"pipeline_parallel": 2}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def bits(rank: int, folder: str) -> None:
    """Three stages, the first of a dense layer, and one process; each goes on from the half of the
    other."""
    root = Path(folder)
    by_turns = Ranks(dist.group.WORLD, pipeline_parallel=3)
    assert run(root / "staged", by_turns, **WAYS).finished
    mixed = {**WAYS, "dtype": "bfloat16", "weights": "bfloat16", "steps": 4, "checkpoint_every": 4}
    run(root / "staged mixed", by_turns, **mixed)
    if rank == 0:
        run(root / "one", None, **WAYS)
        run(root / "one mixed", None, **mixed)
        half_of(root / "one", root / "from one")
        half_of(root / "staged", root / "to one")
        run(root / "to one", None, resume=True)
    dist.barrier()
    filled = Ranks(dist.group.WORLD, pipeline_parallel=3, schedule="GPipe")
    run(root / "from one", filled, resume=True, recompute="full")
    assert filled.describe() == "ranks  3 processes, 3 stages by GPipe, each with all experts"


@pytest.mark.slow
def test_stages_train_to_the_bits_of_one_process(tmp_path: Path):
    text(tmp_path)
    launch(bits, tmp_path, 3)
    one = read_metrics(tmp_path / "one/metrics.jsonl")
    assert sum(row["clipped_heads"] for row in one) > 5
    for name in ("staged", "from one", "to one"):
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        for key in ("loss", "lr", "max_logit", "clipped_heads", "load_layers", "validation_loss"):
            assert [row.get(key) for row in rows] == [row.get(key) for row in one], (name, key)
        balances = [row["auxiliary"] for row in rows]  # layers are added up stage by stage
        assert balances == pytest.approx([row["auxiliary"] for row in one], rel=1e-6)
        same_files(tmp_path / "one", tmp_path / name, HALF, STEPS)
    same_files(tmp_path / "one mixed", tmp_path / "staged mixed", 4)
    assert losses(tmp_path / "one mixed") == losses(tmp_path / "staged mixed")


def same_files(one: Path, other: Path, *steps: int) -> None:
    for step in steps:
        states = [
            json.loads((run / f"step_{step:06d}/training.json").read_text()) for run in (one, other)
        ]
        assert states[0]["files"] == states[1]["files"]
        assert states[0]["optimizer_groups"] == states[1]["optimizer_groups"]


def layouts(rank: int, folder: str) -> None:
    root = Path(folder)
    experts = Ranks(dist.group.WORLD, 2, **STAGED)
    assert experts.layout.replicas == 1 and (rank < 2) == (experts.stage == 0)
    run(root / "2 stages x 2 experts", experts, **WAYS)
    assert re.fullmatch(
        "ranks  4 processes, 2 stages by 1F1B, experts over 2 by .*", experts.describe()
    )
    copies = Ranks(dist.group.WORLD, 1, **STAGED)
    run(root / "2 stages x 2 copies", copies, **WAYS)
    if rank == 0:
        run(root / "one", None, **WAYS)
        half_of(root / "one", root / "from one")
        half_of(root / "2 stages x 2 experts", root / "to copies")
    dist.barrier()
    run(root / "from one", experts, resume=True, recompute="selective")
    run(root / "to copies", copies, resume=True)
    refused(rank, root)
    diverges(root, experts)
    experts.close()


def refused(rank: int, root: Path) -> None:
    first = ValueError if rank == 0 else PeerError
    for layout, wrong in (
        (
            {"pipeline_parallel": 3},
            "--pipeline-parallel: expected a divisor of the 4 processes, got 3",
        ),
        (
            {"pipeline_parallel": 0},
            "--pipeline-parallel: expected a divisor of the 4 processes, got 0",
        ),
        (
            {**STAGED, "expert_parallel": 4},
            "--expert-parallel: .* the 2 processes of a stage, got 4",
        ),
        ({**STAGED, "schedule": "ZB"}, "--schedule: expected 1F1B or GPipe, got ZB"),
        (
            {**STAGED, "expert_parallel": 2, "overlap": True},
            "--overlap: expected --pipeline-parallel 1",
        ),
        (
            {"pipeline_parallel": 1 + rank // 3},
            "--pipeline-parallel: expected the same .* rank 3 2;",
        ),
    ):
        with pytest.raises(first, match=wrong):
            Ranks(dist.group.WORLD, **layout)
    for layout, options, wrong in (
        ({"pipeline_parallel": 4}, {"accumulate": 4}, "at most the model's 3 layers, got 4"),
        (
            STAGED,
            {"accumulate": 1},
            "--accumulate: expected at least the 2 stages, .* got 1; .* GPipe",
        ),
        (STAGED, {"accumulate": 2, "sequences": 3}, "--sequences: .* the 2 processes of a stage"),
    ):
        with pytest.raises(first, match=wrong):
            run(root / "bad", Ranks(dist.group.WORLD, **layout), **options)
    assert not (root / "bad").exists()


def diverges(root: Path, ranks: Ranks) -> None:
    """A gradient of the last stage is not finite: every rank says so, and where."""
    step = Trainer.step

    def broken(self: Trainer, batch: torch.Tensor, number: int):
        if isinstance(self.model, Stage) and self.model.last:
            self.model.model.norm.weight.register_hook(lambda grad: grad * torch.nan)
        return step(self, batch, number)

    Trainer.step = broken
    with pytest.raises(Diverged, match="a gradient of norm nan at model.norm.weight"):
        run(root / "diverged", ranks, **WAYS)
    Trainer.step = step


@pytest.mark.slow
def test_stages_with_expert_ranks_or_copies_learn_as_one_process_does(tmp_path: Path):
    text(tmp_path)
    launch(layouts, tmp_path, 4)
    for name in ("2 stages x 2 experts", "2 stages x 2 copies", "from one", "to copies"):
        same(tmp_path / "one", tmp_path / name)


def hangs(rank: int, folder: str) -> None:
    """The last stage does not come to its second step."""
    ranks = Ranks(dist.new_group(timeout=timedelta(seconds=3)), timeout=3.0, **STAGED)
    step = Trainer.step

    def late(self: Trainer, batch: torch.Tensor, number: int):
        if number == 1 and rank == 1:
            time.sleep(8.0)
            os._exit(0)
        return step(self, batch, number)

    Trainer.step = late
    begin = time.monotonic()
    with pytest.raises(RankError, match="kimi-ops: rank 1 did not come within 3 s"):
        run(Path(folder) / "run", ranks, **WAYS)
    assert 2 < time.monotonic() - begin < 20
    (Path(folder) / "told").touch()
    os._exit(0)


def judges(rank: int, folder: str) -> None:
    """Validations of 8 batches; one that fails in the middle."""
    settings = TrainSettings(preset="tiny", sequences=2, accumulate=2, window=16, threads=1)
    trainer = Trainer(settings, ranks=Ranks(dist.group.WORLD, pipeline_parallel=2))
    windows = torch.randint(0, 64, (16, 17), generator=torch.Generator().manual_seed(0))
    trainer.validate(windows)
    kept = [len(s._stage.fwd_cache) for s in trainer._passes._schedules.values()]
    assert kept and max(kept) <= 2
    with pytest.raises(RuntimeError), trainer._judging():
        raise RuntimeError
    assert trainer.model.training
    assert all(layer.track_max_logits for layer in trainer.model.attention_layers())


@pytest.mark.slow
def test_a_validation_keeps_no_more_than_there_are_stages(tmp_path: Path):
    launch(judges, tmp_path, 2)


@pytest.mark.slow
def test_a_stage_that_hangs_is_named_in_time(tmp_path: Path):
    text(tmp_path)
    launch(hangs, tmp_path, 2)
    assert (tmp_path / "told").exists()


def dies(rank: int, folder: str) -> None:
    """An expert rank of the last stage ends in a forward of the second step."""
    ranks = Ranks(dist.group.WORLD, 2, timeout=20.0, **STAGED)
    forward, seen = Stage.forward, []

    def fatal(self: Stage, x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        if rank == 3 and len(seen) == 5:
            os._exit(0)
        return forward(self, x)

    Stage.forward = fatal
    begin = time.monotonic()
    with pytest.raises(
        RankError, match=r"kimi-ops: the process of ranks? .*3.* has ended.*start all"
    ):
        run(Path(folder) / "run", ranks, **WAYS)
    assert time.monotonic() - begin < 20
    (Path(folder) / f"told {rank}").touch()
    os._exit(0)


@pytest.mark.slow
def test_a_rank_of_a_stage_that_ends_is_named(tmp_path: Path):
    text(tmp_path)
    launch(dies, tmp_path, 4)
    assert len(list(tmp_path.glob("told *"))) == 3


@pytest.mark.slow
def test_the_program_saves_its_stages_and_says_how_to_go_on(tmp_path: Path):
    out, ways = tmp_path / "run", ("--pipeline-parallel=2", "--accumulate=2", "--schedule=GPipe")
    process = started(2, *command(out, *ways))
    wait_for(out / "step_000005", process)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=40)
    step = checkpoint.read_state(checkpoint.find_checkpoint(out))["step"]
    again = (
        f"torchrun --nproc-per-node 2 -m kimi_ops train --out {out} --resume --device cpu "
        "--pipeline-parallel 2 --schedule GPipe"
    )
    assert f"stopped after step {step}; go on with: {again}" in printed
    assert "ranks  2 processes, 2 stages by GPipe" in printed
    assert run(out, None, resume=True, steps=step + 1).finished
    assert KimiK2Config.from_file(out / f"step_{step:06d}" / "config.json").num_hidden_layers == 3
