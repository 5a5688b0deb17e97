# SPDX-License-Identifier: MIT
"""Training with weights in bf16 and fp32 masters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimi_ops.train import TrainSettings, train
from kimi_ops.train.metrics import read_metrics
from kimi_ops.train.trainer import Trainer

HALF = {"dtype": "bfloat16", "weights": "bfloat16"}
TINY = {
    "preset": "tiny",
    "window": 32,
    "sequences": 4,
    "accumulate": 2,
    "steps": 6,
    "validate_every": 3,
    "validation_sequences": 8,
    "checkpoint_every": 3,
    "tau": 0.05,  # QK-Clip acts
    "threads": 1,
}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out: Path, **options):
    text = out.parent / "text.txt"
    text.write_text("".join(f"value {i} is {i * i}\n" for i in range(2000)))
    resume = options.pop("resume", False)
    overrides = options if resume else {**TINY, **options}
    return train(out, data=text, resume=resume, overrides=overrides, say=lambda _: None)


def test_a_resumed_run_has_the_same_bits_and_learns_as_one_in_fp32(tmp_path: Path):
    result = run(tmp_path / "whole", **HALF)
    run(tmp_path / "halves", **HALF, steps=3, decay=0.0)
    again = run(tmp_path / "halves", resume=True, steps=6)
    exact = read_metrics(run(tmp_path / "exact").metrics)
    flat = read_metrics(run(tmp_path / "flat", **HALF, decay=0.0).metrics)
    assert [row["loss"] for row in flat] == [row["loss"] for row in read_metrics(again.metrics)]
    rows = read_metrics(result.metrics)
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in exact], rel=2e-2)
    for name in ("model", "optimizer"):
        ours = load_file(again.checkpoint / f"{name}.safetensors")
        theirs = load_file(tmp_path / f"flat/step_000006/{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        if name == "model":
            assert {x.dtype for key, x in ours.items() if "bias" not in key} == {torch.bfloat16}
        else:
            masters = [x for key, x in ours.items() if key.endswith(".master")]
            assert len(masters) > 30 and {x.dtype for x in masters} == {torch.float32}
            assert not all(torch.equal(x, x.bfloat16().float()) for x in masters)


def test_gradients_of_micro_batches_are_added_up_in_fp32():
    trainer = Trainer(TrainSettings(**{**TINY, **HALF}))
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.dtype for p in trainer.model.parameters())
    )
    trainer.step(torch.randint(97, 105, (8, 33)), 0)
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_other_weights_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="train: weights: expected float32 beside dtype float32"):
        TrainSettings(weights="bfloat16")
    run(tmp_path / "run", **{**HALF, "steps": 1, "decay": 0.0})
    with pytest.raises(ValueError, match="train: --weights: expected bfloat16, with which"):
        run(tmp_path / "run", resume=True, weights="float32")
