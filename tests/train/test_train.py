# SPDX-License-Identifier: MIT
"""The parts of a training run: text, baseline, schedule, settings, metrics, plots."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kimi_ops.train import DataError, TrainSettings
from kimi_ops.train.bigram import bigram_counts, bigram_loss
from kimi_ops.train.data import list_files, load_corpus, training_batch, validation_set
from kimi_ops.train.metrics import MetricsWriter, read_metrics
from kimi_ops.train.plot import plot_run
from kimi_ops.train.schedule import warmup_stable_decay
from kimi_ops.train.trainer import Trainer

TINY = {"preset": "tiny", "window": 32, "sequences": 4, "steps": 6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    for i in range(60):
        path = root / f"part{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"line {i}\n" * (20 + i))
    return root


def test_the_standard_library_is_real_text_without_its_tests():
    files = list_files(None)
    assert len(files) > 150
    assert all(f.suffix == ".py" for f in files)
    assert not any({"test", "tests", "site-packages"} & set(f.parts) for f in files)


def test_the_split_follows_content_and_nothing_else(folder: Path, tmp_path: Path):
    first = load_corpus(folder, window=16, validation_fraction=0.3)
    assert len(first.validation) > 0 and first.files == 60
    total = sum(f.stat().st_size + 1 for f in list_files(folder))
    assert len(first.train) + len(first.validation) == total
    again = load_corpus(folder, window=16, validation_fraction=0.3)
    assert again.fingerprint == first.fingerprint
    train, validation = bytes(first.train).split(b"\0"), bytes(first.validation).split(b"\0")
    assert not (set(train) - {b""}) & (set(validation) - {b""})
    (folder / "part0" / "file0.txt").write_text("other")
    assert load_corpus(folder, window=16, validation_fraction=0.3).fingerprint != first.fingerprint


def test_one_file_is_split_by_position(tmp_path: Path):
    text = bytes(range(1, 201)) * 40
    (tmp_path / "one.bin").write_bytes(text)
    corpus = load_corpus(tmp_path / "one.bin", window=16)
    assert bytes(corpus.train[:-1]) + bytes(corpus.validation[:-1]) == text
    assert 0.04 < len(corpus.validation) / len(text) < 0.06


def test_a_few_unequal_files_are_split_by_position(tmp_path: Path):
    """By content, whole files would go to one side: here most bytes would validate."""
    for size in (6_000, 300_000):
        for seed in range(40):  # some content whose hash makes the large file validate
            text = bytes(np.random.default_rng(seed).integers(1, 256, size, dtype=np.uint8))
            low = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < 0.05 * 2**64
            if low == (size > 6_000):
                break
        assert low == (size > 6_000)
        (tmp_path / f"{size}.bin").write_bytes(text)
    corpus = load_corpus(tmp_path, window=16)
    assert len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.06
    assert len(corpus.train) > 250_000 and Path(corpus.source).is_absolute()


def test_unusable_text_is_a_clear_error(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        load_corpus(tmp_path / "absent", window=16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds none"):
        load_corpus(tmp_path / "empty", window=16)
    (tmp_path / "empty" / "short.txt").write_text("short")
    with pytest.raises(DataError, match="enough text"):
        load_corpus(tmp_path / "empty", window=16)
    (tmp_path / "empty" / "nothing.txt").write_text("")
    with pytest.raises(DataError, match="enough text"):
        load_corpus(tmp_path / "empty", window=16)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "secret.txt").write_text("x" * 1000)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(
        Path, "read_bytes", refuse
    )  # root may read anything, so chmod proves little
    with pytest.raises(DataError, match=r"cannot read .*secret.txt: Permission denied"):
        load_corpus(tmp_path, window=16)


@pytest.mark.skipif(os.geteuid() == 0, reason="root lists every folder")
def test_an_unreadable_folder_is_named(tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(DataError, match="cannot list"):
        load_corpus(tmp_path, window=16)


def test_batches_depend_on_seed_and_step_alone():
    data = np.arange(5000, dtype=np.int64).astype(np.uint8)
    batch = training_batch(data, seed=1, step=7, batch=4, window=9)
    assert batch.shape == (4, 10) and batch.dtype == torch.int64
    assert torch.equal(batch, training_batch(data, seed=1, step=7, batch=4, window=9))
    assert not torch.equal(batch, training_batch(data, seed=1, step=8, batch=4, window=9))
    assert not torch.equal(batch, training_batch(data, seed=2, step=7, batch=4, window=9))
    assert ((batch[:, 1:] - batch[:, :-1]) % 256 == 1).all()  # windows are contiguous


def test_validation_windows_do_not_overlap():
    data = np.arange(1000, dtype=np.int64)
    starts = validation_set(data, count=7, window=9)[:, 0]
    assert len(starts) == 7 and (starts.diff() >= 10).all()
    assert len(validation_set(data[:35], count=7, window=9)) == 3


def test_bigram_of_a_known_source():
    # after a: b or c with equal odds; after b and c: a. The entropy is ln(2) / 2 a byte.
    random = np.random.default_rng(0)
    pairs = np.stack([np.full(20000, 97), random.integers(98, 100, 20000)], axis=1)
    data = pairs.reshape(-1).astype(np.uint8)
    sequences = validation_set(data, count=100, window=100)
    assert abs(bigram_loss(data, sequences) - math.log(2) / 2) < 0.01


def test_bigram_counts_no_transition_across_the_ends():
    train = np.frombuffer(b"ab" * 50, dtype=np.uint8)
    only_ab = torch.tensor([[97, 98]])
    expected = -math.log((50 + 0.01) / (50 + 2.56))
    assert bigram_loss(train, only_ab) == pytest.approx(expected)


def test_bigram_counts_in_pieces(monkeypatch: pytest.MonkeyPatch):
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    expected = np.zeros((256, 256), dtype=np.int64)
    np.add.at(expected, (data[:-1], data[1:]), 1)
    for chunk in (1, 7, 998, 999, 1000, 5000):
        monkeypatch.setattr("kimi_ops.train.bigram._CHUNK", chunk)
        assert np.array_equal(bigram_counts(data), expected)


def test_schedule():
    values = [warmup_stable_decay(s, 100, warmup=10, decay=30, floor=0.1) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0 and set(values[10:71]) == {1.0}
    assert values == sorted(values[:10]) + values[10:71] + sorted(values[71:], reverse=True)
    assert 0.1 < values[-1] < 0.15
    assert warmup_stable_decay(5, 6, warmup=0, decay=0) == 1.0
    with pytest.raises(ValueError, match="within 6 steps"):
        warmup_stable_decay(0, 6, warmup=4, decay=4)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.inf},
        {"warmup": 0.9},
        {"preset": "k2"},
        {"seed": -1},
        {"seed": 2**63},
        {"dtype": "float16"},
        {"recompute": "some"},
        {"fp8_activations": True, "recompute": "full"},
        {"window": 1025},
        {"threads": 10**6},
    ],
)
def test_bad_settings(change: dict):
    with pytest.raises(ValueError, match=f"train: {next(iter(change))}: expected"):
        TrainSettings(**change)


def test_the_window_depends_on_the_model():
    assert TrainSettings().window == 256 and TrainSettings(preset="tiny").window == 128
    assert TrainSettings(preset="tiny", window=9).window == 9


def test_files_that_are_no_text_are_noticed(tmp_path: Path):
    (tmp_path / "a.txt").write_text("größer " * 100)
    (tmp_path / "b.bin").write_bytes(b"\0binary" * 100)
    (tmp_path / "c.txt").write_bytes("größer ".encode("latin-1") * 100)
    corpus = load_corpus(tmp_path, window=4)
    assert [path.name for path in corpus.binary] == ["b.bin", "c.txt"]


def test_metrics_survive_a_cut_and_are_trimmed_on_resume(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s}) for s in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    writer = MetricsWriter(path, 3)
    writer.write({"step": 4, "loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert path.read_text().endswith('{"step": 4, "loss": 1.0}\n')


def test_a_step_balances_clips_and_learns():
    settings = TrainSettings(**TINY, lr=5e-3, warmup=0.0, decay=0.0, tau=1e-3)
    trainer = Trainer(settings)
    batch = torch.randint(97, 105, (4, 33), generator=torch.Generator().manual_seed(0))
    bias = trainer.model.moe_layers()[0].gate.e_score_correction_bias
    first = trainer.step(batch, 0)
    assert torch.isfinite(torch.tensor(first.loss)) and first.loss == pytest.approx(5.55, abs=0.2)
    assert set(bias.abs().tolist()) <= {0.0, float(torch.tensor(settings.bias_rate))} and bias.any()
    assert first.clipped_heads > 0 and first.load_max_over_mean >= 1.0
    losses = [trainer.step(batch, s).loss for s in range(1, 6)]
    assert losses[-1] < first.loss - 0.5
    assert all(p.grad is None for p in trainer.model.parameters())
    assert int(trainer.model.moe_layers()[0].tokens_per_expert.sum()) == 0


def test_accumulation_equals_one_large_batch():
    batch = torch.randint(0, 256, (8, 33), generator=torch.Generator().manual_seed(1))
    losses, weights, biases, maxima = [], [], [], []
    for sequences, accumulate in ((8, 1), (4, 2)):
        options = {**TINY, "sequences": sequences, "accumulate": accumulate}
        trainer = Trainer(TrainSettings(**options))
        statistics = trainer.step(batch, 0)
        losses.append(statistics.loss)
        maxima.append(statistics.max_logit)
        weights.append(trainer.model.lm_head.weight.detach())
        layers = trainer.model.moe_layers()
        biases.append(torch.stack([layer.gate.e_score_correction_bias for layer in layers]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    assert torch.equal(*biases) and biases[0].any()  # by the tokens of all micro-batches
    assert maxima[0] == pytest.approx(maxima[1], rel=1e-5)


def some_batch(sequences: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (sequences, 33), generator=torch.Generator().manual_seed(1))


def test_a_step_takes_the_rates_of_the_schedule():
    settings = TrainSettings(**TINY, lr=6e-3, warmup=0.5, decay=0.5)
    moved = []
    for step, factor in ((0, 1 / 3), (2, 1.0), (5, 1 / 3)):
        trainer = Trainer(settings)
        before = trainer.model.lm_head.weight.detach().clone()
        assert trainer.step(some_batch(), step).lr == pytest.approx(6e-3 * factor)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([6e-3 * factor] * len(rates))
        moved.append(float((trainer.model.lm_head.weight.detach() - before).norm()))
        bias = trainer.model.moe_layers()[0].gate.e_score_correction_bias
        # the bias does not wait for the warm-up, but it falls with the decay
        rate = settings.bias_rate * (factor if step == 5 else 1.0)
        assert float(bias.abs().max()) == pytest.approx(rate)
    assert moved[1] == pytest.approx(3 * moved[0], rel=0.01)
    assert moved[2] == pytest.approx(moved[0], rel=0.01)


def test_the_balance_loss_reaches_the_router():
    with_it, without = (Trainer(TrainSettings(**TINY)) for _ in range(2))
    without.model.auxiliary_loss = lambda: torch.zeros(())
    gradients = []
    for trainer in (with_it, without):
        seen: list[torch.Tensor] = []
        gradients.append(seen)
        gate = trainer.model.moe_layers()[0].gate.weight
        gate.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        assert (trainer.step(some_batch(), 0).auxiliary > 0) == (trainer is with_it)
    assert not torch.equal(gradients[0][-1], gradients[1][-1])


def test_adamw_gradients_are_clipped_before_the_update():
    trainer = Trainer(TrainSettings(**TINY, clip_norm=1e-3))
    trainer.step(some_batch(), 0)
    norms = {}
    for group in trainer.optimizer.param_groups:
        # the first moments: (1 - beta1) = 0.1 and (1 - momentum) = 0.05 of the gradients
        key, share = (
            ("exp_avg", 0.1) if group["algorithm"] == "adamw" else ("momentum_buffer", 0.05)
        )
        moments = [trainer.optimizer.state[p][key] / share for p in group["params"]]
        norms[group["algorithm"]] = float(sum(m.double().square().sum() for m in moments)) ** 0.5
    assert norms["adamw"] == pytest.approx(1e-3, rel=1e-2) and norms["muon"] > 1e-2


def test_the_largest_logit_is_that_of_the_forward_pass():
    trainer, twin = (Trainer(TrainSettings(**TINY)) for _ in range(2))
    twin.model(some_batch()[:, :-1])
    largest = max(float(layer.max_logits.max()) for layer in twin.model.attention_layers())
    assert trainer.step(some_batch(), 0).max_logit == largest != 0


def test_validation_is_the_mean_over_sequences():
    trainer = Trainer(TrainSettings(**TINY))  # four at once: the fifth comes alone
    sequences = torch.cat([some_batch(), torch.full((1, 33), 7)])
    with torch.no_grad():
        logits = trainer.model.eval()(sequences[:, :-1])
        trainer.model.lm_head.weight[7] += 5 * logits.new_ones(())  # the fifth unlike the others
        logits = trainer.model(sequences[:, :-1]).double()
    log_p = logits.log_softmax(-1).gather(-1, sequences[:, 1:, None])
    each = -log_p.mean(dim=(1, 2))
    assert abs(each[4] - each[:4].mean()) > 0.1
    assert trainer.validate(sequences) == pytest.approx(float(each.mean()), rel=1e-6)


def test_validation_leaves_training_untouched():
    batch = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(2))
    trainers = [Trainer(TrainSettings(**TINY)) for _ in range(2)]
    assert trainers[0].validate(batch) == trainers[0].validate(batch)
    assert trainers[0].model.training
    for layer in trainers[0].model.attention_layers():
        assert torch.isneginf(layer.max_logits).all() and layer.track_max_logits
    for trainer in trainers:
        trainer.step(batch, 0)
    for x, y in zip(*(t.model.state_dict().values() for t in trainers), strict=True):
        assert torch.equal(x, y)
    assert trainers[0].step(batch, 1) == trainers[1].step(batch, 1)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    trainer = Trainer(TrainSettings(**TINY))
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.nan
    before = trainer.model.model.embed_tokens.weight.clone()
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        trainer.step(torch.ones(4, 33, dtype=torch.int64), 0)
    assert torch.equal(trainer.model.model.embed_tokens.weight, before)


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    trainer = Trainer(TrainSettings(**TINY))
    weight = trainer.model.lm_head.weight

    def overflow(grad: torch.Tensor) -> torch.Tensor:
        return grad.index_fill(0, torch.tensor([3]), math.inf)

    weight.register_hook(overflow)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="got a gradient of norm inf at lm_head.weight"):
        trainer.step(torch.ones(4, 33, dtype=torch.int64), 0)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert weight.grad is None and not trainer.optimizer.state


def test_plots(tmp_path: Path):
    rows = [
        {"step": s, "loss": 5 / s, "max_logit": 40.0 * s, "load_layers": [2.0, 1.5]}
        for s in range(1, 9)
    ]
    rows[3]["validation_loss"] = 2.0
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = plot_run(tmp_path / "m.jsonl", tmp_path, bigram=2.5, tau=100.0)
    assert [p.name for p in paths] == ["loss.png", "expert_balance.png", "max_logit.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    with pytest.raises(ValueError, match="train first"):
        plot_run(tmp_path / "absent.jsonl", tmp_path, bigram=2.5, tau=100.0)
