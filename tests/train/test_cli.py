# SPDX-License-Identifier: MIT
"""The command line: what it prints, how it fails."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kimi_ops
from kimi_ops import _program
from kimi_ops.cli import app, training
from kimi_ops.cli.options import command_line
from kimi_ops.gpu import Fault
from kimi_ops.train import TrainSettings, train
from kimi_ops.train.checkpoint import find_checkpoint, read_state

runner = CliRunner()


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("def function(argument):\n    return argument\n\n" * 400)
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
    assert result.exit_code == 1 and "without latest.json" in result.output
    result = runner.invoke(app, ["generate", str(tmp_path / "absent")])
    assert result.exit_code == 1
    assert result.output.startswith("error: generate: ") and "does not exist" in result.output


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
    def stopped(*, breaks: bool):
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


@pytest.mark.parametrize("program", ["train", "demo", "generate", "info"])
def test_help_shows_every_default(program: str):
    outputs = [runner.invoke(app, [program, flag]).output for flag in ("-h", "--help")]
    assert outputs[0] == outputs[1] and "Usage: " in outputs[0]
    for block in outputs[0].split("\n  -")[1:]:  # one option each; switches are off unless given
        switch = block.startswith(("-resume ", "-plot ", "-json ", "-overlap ", "h, "))
        assert switch or "[default:" in block, block
    shown = " ".join(outputs[0].split())
    if program == "train":
        assert f"[default: {TrainSettings().lr}]" in shown and "256, or the positions" in shown


def test_version_and_facts_for_programs():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"kimi-ops {kimi_ops.__version__}\n"
    facts = json.loads(runner.invoke(app, ["info", "--json", "--model=k2"]).output)
    assert facts["version"] == kimi_ops.__version__ and "topk_gate" in facts["engines"]
    assert facts["model"]["total"] == 1_026_408_232_448
    assert "model" not in json.loads(runner.invoke(app, ["info", "--json"]).output)


def test_bench_hands_its_help_to_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text("import sys; print('got', sys.argv)")
    words = [sys.executable, "-m", "kimi_ops", "bench", "--help", "-h", "--quick", "x"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'--help', '-h', '--quick', 'x']" in result.stdout


def tiny(out: Path, text: Path, *more: str) -> list[str]:
    return ["train", f"--out={out}", f"--data={text}", "--preset=tiny", "--steps=6", *more]


def test_the_smallest_model_runs_on_its_own_defaults(finished: Path, tmp_path: Path):
    result = runner.invoke(app, tiny(tmp_path / "run", finished.parent / "text.txt"))
    assert result.exit_code == 0, result.output
    assert "step 1/6: loss " in result.output and "\r" not in result.output
    result = runner.invoke(app, ["generate", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output


def test_the_advice_of_a_diverged_run_can_be_followed(finished: Path, tmp_path: Path):
    text, run = finished.parent / "text.txt", tmp_path / "a run"

    def advice(arguments: list[str]) -> list[str]:
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1 and "expected finite numbers" in result.output, result.output
        return shlex.split(result.output.strip().splitlines()[-1].split(" with: kimi-ops ")[1])

    def milder(words: list[str], lr: str) -> list[str]:
        assert words[words.index("--lr") + 1] != lr
        return [lr if words[i - 1] == "--lr" else word for i, word in enumerate(words)]

    words = advice(tiny(run, text, "--lr=1e30", "--threads=1", "--keep=3"))
    assert "--resume" not in words and words[words.index("--keep") + 1] == "3"
    result = runner.invoke(app, milder(words, "0.01"))
    assert result.exit_code == 0, result.output

    words = advice(["train", f"--out={run}", "--resume", "--steps=12", "--lr=1e30"])
    assert "--resume" in words
    result = runner.invoke(app, milder(words, "0.01"))
    assert result.exit_code == 0 and "lr 1e+30 -> 0.01" in result.output, result.output
    assert read_state(find_checkpoint(run))["step"] == 12


def test_weights_beyond_repair_are_left_behind(finished: Path, tmp_path: Path):
    text, run = finished.parent / "text.txt", tmp_path / "run"
    broken = tiny(run, text, "--lr=1e20", "--threads=1", "--checkpoint-every=1", "--keep=1")
    result = runner.invoke(app, broken)  # step 2 diverges whatever the lr
    assert result.exit_code == 1 and "no older checkpoint; start again" in result.output
    words = shlex.split(result.output.strip().splitlines()[-1].split(" with: kimi-ops ")[1])
    assert words[words.index("--out") + 1] == f"{run}-slower"
    words[words.index("--lr") + 1] = "0.01"  # half of 1e20 diverges as well
    assert runner.invoke(app, words).exit_code == 0


def test_memory_that_does_not_suffice_is_an_error_in_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    errors = (
        MemoryError("Unable to allocate 96.1 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    )
    arguments = tiny(tmp_path / "run", finished.parent / "text.txt")
    for error in errors:

        def full(self, batch, step, error=error):
            raise error

        monkeypatch.setattr("kimi_ops.train.trainer.Trainer.step", full)
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert "halve --sequences" in result.output.splitlines()[-1]
    monkeypatch.setattr(
        "kimi_ops.train.trainer.Trainer.step", lambda *_: (_ for _ in ()).throw(RuntimeError("bug"))
    )
    assert isinstance(runner.invoke(app, arguments).exception, RuntimeError)


def test_a_gpu_that_does_not_work_is_told_once(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fault = Fault(True, "the GPU's memory is full", "end what fills it")
    monkeypatch.setattr("kimi_ops.gpu.gpu_fault", lambda: fault)
    told = f"on the CPU, because {fault}"
    arguments = tiny(tmp_path / "run", finished.parent / "text.txt")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0 and result.output.count(told) == 1
    result = runner.invoke(app, ["generate", str(finished)])
    assert result.exit_code == 0 and told in result.stderr and told not in result.stdout
    for program in (["generate", str(finished)], [*arguments, f"--out={tmp_path / 'other'}"]):
        result = runner.invoke(app, [*program, "--device=cuda"])
        assert result.exit_code == 1 and f"got none: {fault}" in result.output
    assert not (tmp_path / "other").exists()


def test_binary_data_is_noticed(tmp_path: Path):
    (tmp_path / "data.bin").write_bytes(bytes(range(256)) * 100)
    result = runner.invoke(app, tiny(tmp_path / "run", tmp_path / "data.bin"))
    assert result.exit_code == 0 and "1 of 1 files are no UTF-8 text" in result.output


def test_prompts_of_any_bytes(finished: Path):
    for prompt in ("", os.fsdecode(b"\xff\xfe"), "größer"):
        result = runner.invoke(app, ["generate", str(finished), "--prompt", prompt])
        assert result.exit_code == 0, result.output
    result = runner.invoke(app, ["generate", str(finished), "--prompt", "x" * 127])
    assert result.exit_code == 1 and "--prompt: expected at most 126 bytes" in result.output
    for number in ("0", "-3"):
        result = runner.invoke(app, ["generate", str(finished), f"--max-tokens={number}"])
        assert result.exit_code == 1 and "--max-tokens: expected 1 to" in result.output


def test_a_command_to_type_is_quoted():
    words = command_line("train", out=Path("my run"), resume=True, plot=False, data=None, lr=0.1)
    assert words == "kimi-ops train --out 'my run' --resume --lr 0.1"


def test_nothing_overlaps_on_one_rank(tmp_path: Path):
    result = runner.invoke(app, [*tiny(tmp_path / "run", tmp_path / "text.txt"), "--overlap"])
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    assert "--overlap: expected experts over several processes" in result.output


def test_a_run_goes_on_as_it_was_shared_out():
    place = training._ranks(
        training.Request(Path("run"), None, False, "cpu", {}, False, False, 4, 120.0, True)
    )
    words = command_line("train", out=Path("run"), resume=True, **place)
    assert words == "kimi-ops train --out run --resume --expert-parallel 4 --overlap"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script that pip writes for the entry point."""
    path = tmp_path / "kimi-ops"
    path.write_text("import sys\nfrom kimi_ops.cli import main\nsys.exit(main())\n")
    return path


def both_ways(script: Path) -> list[list[str]]:
    return [[sys.executable, str(script)], [sys.executable, "-m", "kimi_ops"]]


def test_ctrl_c_while_torch_loads_is_quiet(script: Path):
    for words in both_ways(script):
        process = subprocess.Popen(
            [*words, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # a shell's background jobs ignore Ctrl-C, and so would what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        maps = Path(f"/proc/{process.pid}/maps")
        limit = time.monotonic() + 60
        while "libtorch" not in maps.read_text():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == 130


def test_only_the_programs_settle_the_environment(script: Path, monkeypatch: pytest.MonkeyPatch):
    (script.parent / "show.py").write_text("import kimi_ops, os; print(dict(os.environ))")
    probe = "import os, kimi_ops.cli as c; c.main = lambda: print(dict(os.environ))"
    script.write_text(f"{probe}; c.main()")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KINETO_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)

    def environment(*words: str, **more: str) -> dict:
        result = subprocess.run(
            [sys.executable, *words], env=os.environ | more, capture_output=True, text=True
        )
        return eval(result.stdout)

    program = environment(str(script))
    assert program["GOMP_SPINCOUNT"] == _program.SPIN_COUNT and program["KINETO_LOG_LEVEL"] == "5"
    assert environment(str(script), GOMP_SPINCOUNT="7")["GOMP_SPINCOUNT"] == "7"
    assert "GOMP_SPINCOUNT" not in environment(str(script), OMP_WAIT_POLICY="active")
    library = environment(str(script.parent / "show.py"))
    assert "GOMP_SPINCOUNT" not in library and "KINETO_LOG_LEVEL" not in library


@pytest.mark.parametrize(
    ("argv", "orig", "expected"),
    [
        (["/usr/bin/kimi-ops", "train"], ["python", "/usr/bin/kimi-ops", "train"], True),
        (["kimi-ops.exe"], ["kimi-ops.exe"], True),
        (["-m", "train"], ["python", "-W", "error", "-m", "kimi_ops", "train"], True),
        (["-m", "kimi_ops"], ["python", "-m", "other", "kimi_ops"], False),
        (["train.py", "kimi-ops"], ["python", "train.py", "kimi-ops"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_how_a_program_is_told_from_a_library(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], orig: list[str], expected: bool
):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig)
    assert _program.is_program() == expected
