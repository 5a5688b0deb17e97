# SPDX-License-Identifier: MIT
"""Checkpoints: whole or absent, and a resumed run gives the bits of an uninterrupted one."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.train import CheckpointError, DataError, TrainSettings, folder, loop, train
from kimi_ops.train.checkpoint import (
    _digest,
    find_checkpoint,
    load_optimizer,
    read_state,
    save_checkpoint,
)
from kimi_ops.train.metrics import read_metrics
from kimi_ops.train.trainer import Trainer

TINY = {
    "preset": "tiny",
    "window": 32,
    "sequences": 4,
    "steps": 24,
    "validate_every": 8,
    "validation_sequences": 8,
    "checkpoint_every": 4,
    "threads": 1,
}

LONGER = {**TINY, "steps": 64}  # for processes that must still run when a signal reaches them


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"value {i} is {i * i}\n" for i in range(2000)))
    return path


def run(out: Path, text: Path, **options):
    resume, say = options.pop("resume", False), options.pop("say", lambda line: None)
    overrides = options if resume else {**TINY, **options}
    return train(out, data=text, resume=resume, overrides=overrides, say=say, progress=False)


def same_state(a: Path, b: Path) -> bool:
    """Weights, biases and moments of two checkpoints, bit for bit."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        x, y = load_file(a / name), load_file(b / name)
        if x.keys() != y.keys() or not all(torch.equal(x[key], y[key]) for key in x):
            return False
    return True


def command(out: Path, text: Path, *more: str) -> list[str]:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in LONGER.items()]
    options = [o for o in options if not o.startswith("--validation-sequences")]
    return [
        *(sys.executable, "-m", "kimi_ops", "train", f"--out={out}", f"--data={text}"),
        *("--no-progress", "--device=cpu", *(more or options)),
    ]


def start_and_wait_for(step: int, out: Path, text: Path, *more: str) -> subprocess.Popen:
    """The command in a process of its own, once its metrics show `step`."""
    process = subprocess.Popen(
        command(out, text, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    limit = time.monotonic() + 180
    while not any(row["step"] >= step for row in read_metrics(out / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.005)
    return process


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, text: Path):
    process = start_and_wait_for(6, tmp_path / "killed", text)
    process.send_signal(signal.SIGKILL)
    process.wait()
    interrupted = read_state(find_checkpoint(tmp_path / "killed"))["step"]
    assert 4 <= interrupted < 64
    done = subprocess.run(
        command(tmp_path / "killed", text, "--resume"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"after step {interrupted} of 64" in done.stdout

    whole = subprocess.run(command(tmp_path / "whole", text), capture_output=True, timeout=120)
    assert whole.returncode == 0
    last = [find_checkpoint(tmp_path / name) for name in ("killed", "whole")]
    assert last[0].name == last[1].name == "step_000064"
    assert same_state(*last)
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole"))
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(1, 65))
    assert [r["loss"] for r in a] == [r["loss"] for r in b]
    assert a[-1]["validation_loss"] == b[-1]["validation_loss"]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, text: Path):
    process = start_and_wait_for(2, tmp_path / "run", text)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    state = read_state(find_checkpoint(tmp_path / "run"))
    assert process.returncode == 130 and "Traceback" not in output
    assert f"stopped after step {state['step']}" in output and "--resume" in output
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == state["step"]


def test_two_runs_give_the_same_bits_and_the_seed_matters(tmp_path: Path, text: Path):
    results = [run(tmp_path / name, text, steps=6) for name in ("a", "b")]
    assert same_state(results[0].checkpoint, results[1].checkpoint)
    other = run(tmp_path / "c", text, steps=6, seed=1)
    assert not same_state(results[0].checkpoint, other.checkpoint)


def test_a_finished_run_resumes_to_itself_and_old_checkpoints_go(tmp_path: Path, text: Path):
    first = run(tmp_path / "run", text)
    again = run(tmp_path / "run", text, resume=True)
    assert again.finished and again.checkpoint == first.checkpoint
    assert again.validation_loss == first.validation_loss
    folders = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert folders == ["step_000020", "step_000024"]


def test_the_model_of_a_checkpoint_loads_as_a_model(tmp_path: Path, text: Path):
    result = run(tmp_path / "run", text, steps=4)
    model = KimiK2.from_pretrained(result.checkpoint)
    trained = load_file(result.checkpoint / "model.safetensors")
    assert torch.equal(model.lm_head.weight, trained["lm_head.weight"])
    assert model.config.vocab_size == 256


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, text: Path):
    result = run(tmp_path / "run", text, steps=4)
    trainer = Trainer(TrainSettings(**TINY))
    before = sorted(tmp_path.joinpath("run").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond 20 kB
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write .*step_000009.*step_000004 is intact"
        ):
            save_checkpoint(tmp_path / "run", trainer.model, trainer.optimizer, {"step": 9}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.joinpath("run").iterdir()) == before
    assert find_checkpoint(tmp_path / "run") == result.checkpoint
    read_state(result.checkpoint)


@pytest.mark.parametrize("moment", ["_write", "replace", "set_latest"])
def test_a_failure_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    result = run(tmp_path / "run", text, steps=4)
    trainer = Trainer(TrainSettings(**TINY))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    if moment == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(f"kimi_ops.train.checkpoint.{moment}", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path / "run", trainer.model, trainer.optimizer, {"step": 9}, 2)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path / "run") == result.checkpoint
    read_state(result.checkpoint)
    assert not list((tmp_path / "run").glob(".*.tmp"))
    saved = save_checkpoint(tmp_path / "run", trainer.model, trainer.optimizer, {"step": 9}, 2)
    assert find_checkpoint(tmp_path / "run") == saved


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path, text: Path, name: str, damage: str):
    file = run(tmp_path / "run", text, steps=4).checkpoint / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2 if name != "training.json" else 0] ^= 0x55
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        run(tmp_path / "run", text, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, text: Path):
    """Whole files, but not those that its settings ask for."""
    folder = run(tmp_path / "run", text, steps=4).checkpoint
    state = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_routed_experts": 16}))
    state["files"]["config.json"] = _digest(folder / "config.json")
    (folder / "training.json").write_text(json.dumps(state))
    wrong = "expected the model tiny, got .*config.json with n_routed_experts 16 in place of 8"
    with pytest.raises(CheckpointError, match=wrong):
        run(tmp_path / "run", text, resume=True)


def test_resuming_from_an_older_checkpoint_stays_in_the_run(tmp_path: Path, text: Path):
    """What the message about a damaged checkpoint advises."""
    first = run(tmp_path / "run", text, steps=8)
    whole = load((first.checkpoint / "model.safetensors").read_bytes())
    (first.checkpoint / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="step_000008.*another step_.* folder: give it as"):
        run(tmp_path / "run", text, resume=True)
    older = tmp_path / "run" / "step_000004"
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(older, text)
    again = run(older, text, resume=True)
    assert again.checkpoint == first.checkpoint and again.metrics == first.metrics
    assert find_checkpoint(tmp_path / "run") == first.checkpoint
    trained = load_file(again.checkpoint / "model.safetensors")
    assert all(torch.equal(trained[name], whole[name]) for name in whole)
    assert [row["step"] for row in read_metrics(first.metrics)] == list(range(1, 9))
    assert not (older / "latest.json").exists() and not (older / "metrics.jsonl").exists()


def test_a_checkpoint_is_found_from_inside_itself(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = run(tmp_path / "run", text, steps=4).checkpoint
    monkeypatch.chdir(folder)
    assert run(Path("."), text, resume=True).checkpoint == folder


def test_a_full_disk_under_the_metrics_keeps_the_steps(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    write, lines = os.write, []

    def fill(descriptor: int, content: bytes) -> int:
        lines.append(content)
        if len(lines) == 7:
            return write(descriptor, bytes(content)[:9])
        if len(lines) == 8:
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl.*No space.*step_000007 was saved"):
        run(tmp_path / "run", text, steps=8)
    monkeypatch.undo()
    assert read_state(find_checkpoint(tmp_path / "run"))["step"] == 7
    content = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert content.count("\n") == 6 and content.endswith("}\n")
    again, whole = run(tmp_path / "run", text, resume=True), run(tmp_path / "b", text, steps=8)
    assert same_state(again.checkpoint, whole.checkpoint)


def test_a_full_disk_at_the_start_of_a_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kimi_ops.train.metrics.replace_file", full)
    with pytest.raises(CheckpointError, match="train: --out: .*No space left"):
        run(tmp_path / "run", text)


def test_ctrl_c_during_a_save_leaves_nothing_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer(TrainSettings(**TINY))
    left = tmp_path / ".step_000003.tmp"  # by a kill
    left.mkdir()

    def broken_off(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("kimi_ops.train.checkpoint._sync", broken_off)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, trainer.model, trainer.optimizer, {"step": 9}, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_optimizer_does_not_live_in_the_file(tmp_path: Path, text: Path):
    result = run(tmp_path / "run", text, steps=4)
    trainer = Trainer(TrainSettings(**TINY))
    load_optimizer(result.checkpoint, read_state(result.checkpoint), trainer.optimizer)
    file = result.checkpoint / "optimizer.safetensors"
    before = [v.clone() for s in trainer.optimizer.state.values() for v in s.values()]
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    after = [v for s in trainer.optimizer.state.values() for v in s.values()]
    assert len(before) > 10
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_what_a_resumed_run_may_not_change(tmp_path: Path, text: Path):
    run(tmp_path / "run", text, steps=4)
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(tmp_path / "run", text)
    same = {"threads": 0, "window": 0}
    assert train(tmp_path / "run", resume=True, overrides=same, progress=False).finished
    for name, value in (("preset", "mini"), ("seed", 1), ("window", 16)):
        with pytest.raises(ValueError, match=f"train: --{name}: expected .*: (it dec|the weights)"):
            train(tmp_path / "run", resume=True, overrides={name: value}, progress=False)
    with pytest.raises(ValueError, match="expected a product of 4, .* got 2 x 1: it decides"):
        train(tmp_path / "run", resume=True, overrides={"sequences": 2}, progress=False)
    with pytest.raises(ValueError, match="train: --steps: expected at least the 4 steps made"):
        train(tmp_path / "run", resume=True, overrides={"steps": 3}, progress=False)
    with pytest.raises(ValueError, match="train: lr: expected a positive number"):
        train(tmp_path / "run", resume=True, overrides={"lr": -1.0}, progress=False)
    with pytest.raises(CheckpointError, match="absent, which does not exist; leave --resume out"):
        run(tmp_path / "absent", text, resume=True)
    text.write_text(text.read_text() + "more")
    with pytest.raises(CheckpointError, match="content differs"):
        run(tmp_path / "run", text, resume=True)


def test_a_resumed_run_takes_new_settings_and_keeps_them(tmp_path: Path, text: Path):
    run(tmp_path / "run", text, steps=4)
    said: list[str] = []
    changes = {"steps": 6, "lr": 0.004, "weight_decay": 0.0, "tau": 50.0, "keep_checkpoints": 3}
    changes |= {"sequences": 2, "accumulate": 2}  # the same four windows a step
    changes |= {"validate_every": 3, "checkpoint_every": 1, "dtype": "bfloat16"}
    changes |= {"recompute": "selective", "fp8_activations": True}
    result = train(tmp_path / "run", resume=True, overrides=changes, say=said.append)
    assert result.step == 6 and result.finished
    told = "steps 4 -> 6; the learning rate follows the schedule of the new total"
    assert told in said and "lr 0.012 -> 0.004" in said
    rows = read_metrics(result.metrics)
    # of 6 steps the last two decay: 2/2 and 1/2 of the peak
    assert [row["lr"] for row in rows[4:]] == pytest.approx([0.004, 0.002])
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 6]
    state = read_state(result.checkpoint)
    assert {name: state["settings"][name] for name in changes} == changes
    decays = {group["weight_decay"] for group in state["optimizer_groups"]}
    assert decays == {0.0}
    names = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    assert names == ["step_000004", "step_000005", "step_000006"]


def test_new_settings_are_kept_before_the_first_step(tmp_path: Path, text: Path):
    run(tmp_path / "run", text, steps=4)
    train(tmp_path / "run", resume=True, overrides={"lr": 0.004}, say=lambda line: None)
    again = read_state(find_checkpoint(tmp_path / "run"))
    assert again["settings"]["lr"] == 0.004 and again["step"] == 4


def test_a_checkpoint_of_an_older_version_resumes(tmp_path: Path, text: Path):
    """Without the settings and facts that came later."""
    results = [run(tmp_path / name, text, steps=4) for name in ("old", "new")]
    file = results[0].checkpoint / "training.json"
    state = json.loads(file.read_text())
    del state["settings"]["dtype"], state["device"], state["data"]["default"]
    file.write_text(json.dumps(state))
    ends = [
        train(tmp_path / name, data=text, resume=True, overrides={"steps": 8}, say=lambda _: None)
        for name in ("old", "new")
    ]
    assert same_state(ends[0].checkpoint, ends[1].checkpoint)


def test_two_runs_in_one_folder(tmp_path: Path, text: Path):
    (tmp_path / "run").mkdir()
    other = os.open(tmp_path / "run" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="another process is training in"):
            run(tmp_path / "run", text)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        os.close(other)
    assert run(tmp_path / "run", text, steps=2).finished


@pytest.mark.parametrize("resume", [False, True])
def test_what_was_read_before_the_lock_must_still_hold(tmp_path, text, monkeypatch, resume):
    """Another process trains, saves and ends while this one reads its text."""
    folder = tmp_path / "run"
    if resume:
        run(folder, text, steps=4)
    real = loop.bigram_loss

    def meanwhile(*arguments):
        monkeypatch.setattr(loop, "bigram_loss", real)
        run(folder, text, steps=8, resume=resume)
        return real(*arguments)

    monkeypatch.setattr(loop, "bigram_loss", meanwhile)
    with pytest.raises(CheckpointError, match="another process has written"):
        run(folder, text, steps=12, resume=resume)
    assert find_checkpoint(folder).name == "step_000008"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_folder_without_locks_is_told(tmp_path: Path, text: Path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(9, "Bad file descriptor")

    said: list[str] = []
    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    run(tmp_path / "run", text, steps=2, say=said.append)
    assert any("cannot be locked" in line for line in said)


def test_what_latest_names_may_be_gone(tmp_path: Path, text: Path):
    gone = run(tmp_path / "run", text, steps=8).checkpoint
    gone.rename(tmp_path / "elsewhere")
    older = tmp_path / "run" / "step_000004"
    with pytest.raises(CheckpointError, match=f"without training.json; give {older} in its place"):
        run(tmp_path / "run", text, resume=True)


def test_bad_text_leaves_no_run_behind(tmp_path: Path):
    with pytest.raises(DataError):
        run(tmp_path / "run", tmp_path / "absent")
    assert not (tmp_path / "run").exists()
    assert json.loads(json.dumps(TrainSettings().to_dict())) == TrainSettings().to_dict()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_what_matters(
    tmp_path: Path, text: Path, capsys, monkeypatch: pytest.MonkeyPatch, terminal: bool
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    overrides = {**TINY, "steps": 12, "validate_every": 12}
    said: list[str] = []
    train(tmp_path / "run", data=text, overrides=overrides, say=said.append)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    bar = capsys.readouterr().err
    lines = [line for line in said if line.startswith("step ")]
    assert ("\r" in bar) == terminal and bool(lines) != terminal
    if not terminal:
        assert [line.split(":")[0] for line in lines] == ["step 1/12", "step 10/12", "step 12/12"]
    for field in (
        f"loss {row['loss']:.3f}",
        f"val {row['validation_loss']:.3f}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"max logit {row['max_logit']:.1f}",
        f"load {row['load_max_over_mean']:.2f}",
    ):
        assert field in (bar if terminal else lines[-1])


def test_train_in_a_thread_of_its_own(tmp_path: Path, text: Path):
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, tmp_path / "run", text, steps=2).result()
    assert result.finished
