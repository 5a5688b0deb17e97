# SPDX-License-Identifier: MIT
"""The command line: what it prints, how it fails."""

import shlex
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kimi_ops.cli import app
from kimi_ops.train import train

runner = CliRunner()


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("def function(argument):\n    return argument\n\n" * 200)
    overrides = {
        **{"preset": "tiny", "window": 32, "sequences": 4, "steps": 30, "validate_every": 30},
        **{"warmup": 0.0, "lr": 0.01, "validation_sequences": 4, "threads": 1},
    }
    train(
        folder / "run",
        data=folder / "text.txt",
        overrides=overrides,
        say=lambda line: None,
        progress=False,
    )
    return folder / "run"


def test_info_counts_kimi_k2():
    result = runner.invoke(app, ["info", "--model", "k2"])
    assert result.exit_code == 0, result.output
    for text in ("torch", "topk_gate", "1,026,408,232,448", "32,861,500,928"):
        assert text in result.output
    assert runner.invoke(app, ["info", "--model", "k9"]).exit_code == 1


def test_generate_is_reproducible_and_knows_its_limits(finished: Path):
    def call(*more: str):
        return runner.invoke(app, ["generate", str(finished), "--prompt=def ", *more])

    first = call("--max-tokens=20", "--seed=1")
    assert first.exit_code == 0, first.output
    assert first.output.startswith("def ")
    assert call("--max-tokens=20", "--seed=1").output == first.output
    greedy = call("--max-tokens=20", "--temperature=0", "--seed=1").output
    assert greedy == call("--max-tokens=20", "--temperature=0", "--seed=2").output
    long = call("--max-tokens=1000")
    assert long.exit_code == 1 and "within 128 positions" in long.output


def test_generate_without_a_checkpoint(tmp_path: Path):
    result = runner.invoke(app, ["generate", str(tmp_path)])
    assert result.exit_code == 1 and "train first" in result.output


def test_train_reports_errors_without_a_traceback(tmp_path: Path):
    arguments = ["train", f"--out={tmp_path / 'run'}", f"--data={tmp_path / 'absent'}"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "does not exist" in result.output
    result = runner.invoke(app, ["train", f"--out={tmp_path / 'run'}", "--lr=-1"])
    assert result.exit_code == 1 and "train: lr: expected a positive number" in result.output
    assert not (tmp_path / "run").exists()


def test_a_plot_that_cannot_be_drawn_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = runner.invoke(app, ["train", f"--out={tmp_path / 'run'}", "--plot"])
    assert result.exit_code == 1 and "pip install matplotlib" in result.output
    assert not (tmp_path / "run").exists()


def stop_after(steps: int):
    """A stand-in for stop_on_signal: a signal arrives while step `steps` runs."""

    @contextmanager
    def stopped():
        calls = iter(range(10**6))
        yield lambda: next(calls) >= steps

    return stopped


def test_the_printed_command_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("some text.txt").write_text("def function(argument):\n    return argument\n\n" * 200)
    options = ["--preset=tiny", "--window=32", "--sequences=4", "--steps=6", "--no-progress"]
    with monkeypatch.context() as patch:
        patch.setattr("kimi_ops.train.loop.stop_on_signal", stop_after(2))
        result = runner.invoke(app, ["train", "--out=my run", "--data=some text.txt", *options])
    assert result.exit_code == 130, result.output
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("stopped after step 2; go on with: kimi-ops train ")
    again = runner.invoke(app, shlex.split(line.split("kimi-ops ")[1]))
    assert again.exit_code == 0 and "after step 2 of 6" in again.output, again.output


def test_a_second_ctrl_c_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken_off(self, batch, step):
        raise KeyboardInterrupt

    monkeypatch.setattr("kimi_ops.train.trainer.Trainer.step", broken_off)
    arguments = ["train", f"--out={tmp_path / 'run'}", "--preset=tiny", "--window=32"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 130
    assert "broken off without saving; there is no checkpoint yet" in result.output


def test_wrong_inputs_are_errors_in_one_line(finished: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text("[]")
    cases = [
        (["generate", str(tmp_path)], "expected a JSON object, got"),
        (["generate", str(finished), f"--seed={2**64}"], "generate: seed: expected 0 to 2"),
        (["train", f"--out={tmp_path / 'run'}", f"--seed={2**64}"], "train: seed: expected"),
        # the folder is looked at before the text is
        (["train", f"--out={tmp_path / 'config.json'}", "--data=absent"], "expected a folder, got"),
    ]
    for arguments, message in cases:
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), arguments
        assert message in result.output and result.output.count("\n") <= 2, result.output


def test_a_plot_that_fails_is_an_error(finished: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kimi_ops.cli.training.plot_run", full)
    result = runner.invoke(app, ["train", f"--out={finished}", "--resume", "--plot"])
    assert result.exit_code == 1 and "error: [Errno 28] No space left" in result.output


def test_demo_of_a_finished_run_shows_it_again(finished: Path):
    text = finished.parent / "text.txt"
    result = runner.invoke(app, ["demo", f"--out={finished}", f"--data={text}", "--no-progress"])
    assert result.exit_code == 0, result.output
    assert "engines " in result.output and "byte bigram" in result.output
    for name in ("loss", "expert_balance", "max_logit"):
        assert (finished / f"{name}.png").exists() and f"{name}.png" in result.output
    assert "a sample" in result.output


def test_bench_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["bench"])
    assert result.exit_code == 1 and "source checkout" in result.output
