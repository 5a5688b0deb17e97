# SPDX-License-Identifier: MIT
"""The one command for a machine with a GPU, where there is none: what it builds, that its parts
keep their limits and leave what they found, and what it says when it cannot run."""

import ast
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.checkout import ROOT
from benchmarks.device_check import __main__ as program
from benchmarks.device_check import machine, parts, primitives, steps, suites
from benchmarks.device_check.junit import summary
from benchmarks.device_check.one_kernel import KERNELS
from benchmarks.device_check.steps import Record, Step, check

NO_GPU = machine.gpu_missing()
SOABI = sysconfig.get_config_var("SOABI")


def python(name: str, code: str, limit: float = 30.0, **more: str) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, **more)


@pytest.fixture(autouse=True)
def no_worker():
    """A pytest that a step runs is no worker of the pytest that runs this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield


@pytest.fixture
def record(tmp_path: Path) -> Record:
    (tmp_path / "logs").mkdir()
    return Record(tmp_path / "out", tmp_path / "logs", {"machine": {"gpu": "a fake"}})


def read(out: Path) -> dict:
    return json.loads((out / "device_check.json").read_text())


def archived(out: Path, name: str) -> str:
    with tarfile.open(out / "logs.tgz") as archive:
        member = archive.extractfile(f"logs/{name}")
        assert member is not None
        return member.read().decode()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_step_that_hangs_ends_with_all_that_it_started(record, tmp_path):
    child = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)"""
    start = time.monotonic()
    results = check([python("good", "print('fine')"), python("hangs", child, 3)], record, 60)
    assert time.monotonic() - start < 20
    assert [r.status for r in results] == ["passed", "timed out"] and results[0].tail == "fine\n"
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 20  # the kernel takes its time to bury it
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


def test_the_whole_is_limited_and_two_files_say_all(record, capsys):
    found = record.logs / "found.json"
    results = check(
        [
            python("one", f"open({str(found)!r}, 'w').write('[1, 2]')", result="found.json"),
            python("bad", "raise SystemExit('broken')"),
            python("absent", "pass", needs="no-such-program"),
            python("empty", "pass", result="nothing.json"),
            python("long", "import time; time.sleep(60)"),
            python("late", "pass"),
        ],
        record,
        seconds=6.0,
    )
    statuses = ["passed", "failed", "skipped", "passed", "timed out", "no time"]
    assert [r.status for r in results] == statuses
    assert sorted(path.name for path in record.out.iterdir()) == ["device_check.json", "logs.tgz"]
    report = read(record.out)
    assert report["machine"] == {"gpu": "a fake"}
    one, bad, absent, empty, long, late = report["steps"]
    assert one["found"] == [1, 2] and one["returncode"] == 0 and one["wall_s"] > 0
    assert "broken" in bad["tail"] and bad["returncode"] == 1
    assert absent["tail"] == "no-such-program is not on the PATH"
    assert empty["found"] == "nothing.json was not written"
    assert long["limit_s"] < 6.0 and "all are used" in late["tail"]
    assert "broken" in archived(record.out, "bad.log")
    assert archived(record.out, "found.json") == "[1, 2]"
    assert "broken" in capsys.readouterr().out


def test_a_step_has_its_variables(record):
    code = "import os; print(os.environ['KIMI_OPS_SAID'])"
    step = Step("says", [sys.executable, "-c", code], 30, variables={"KIMI_OPS_SAID": "so"})
    assert check([step], record, 60)[0].tail == "so\n"
    assert parts.sanitize(record.logs)[0].variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


@pytest.mark.skipif(NO_GPU is None, reason="this machine has a GPU")
def test_start_fails_where_no_gpu_computes(record):
    (result,) = check([parts.start(record.logs)], record, 120)
    assert result.status == "failed" and result.found["version"], result.tail
    assert "start: expected kimi_ops to compute on a GPU: " in result.tail


def test_tests_that_are_all_skipped_fail(record, tmp_path):
    path = tmp_path / "test_nothing.py"
    path.write_text("import pytest\n\ndef test_it():\n    pytest.skip('no GPU')\n")
    made = parts.tests(record.logs, "test_", [str(path)])
    results = check([python("start", "pass"), *made], record, 120)
    assert results[1].returncode == 0 and results[1].status == "failed"
    assert results[1].tail.startswith("expected tests that pass, got none\n")
    assert results[1].found["reasons"] == {"no GPU": 1}


def test_after_a_failed_start_nothing_else_runs(record):
    results = check([python("start", "raise SystemExit(1)"), python("next", "pass")], record, 60)
    assert [r.status for r in results] == ["failed", "skipped"]
    assert results[1].tail == "start failed"


RUNNER = """
import sys
from pathlib import Path
from benchmarks.device_check import steps
steps.TICK_SECONDS = 0.2
folder = Path(sys.argv[1])
(folder / "logs").mkdir()
python = [sys.executable, "-c"]
hang = "import time; print('so far', flush=True); time.sleep(60)"
two = [steps.Step("one", [*python, "print(1)"], 20), steps.Step("hang", [*python, hang], 60)]
results = steps.check(two, steps.Record(folder / "out", folder / "logs", {}), 100)
sys.exit(143 if results[-1].status == "stopped" else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_the_logs_that_it_has(tmp_path, number):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])}
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path)], env=environment)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.1)
            if (tmp_path / "out" / "logs.tgz").exists():
                with tarfile.open(tmp_path / "out" / "logs.tgz") as archive:
                    sizes = {m.name: m.size for m in archive.getmembers()}
                if sizes.get("logs/hang.log"):
                    break
        runner.send_signal(number)
        status = runner.wait(timeout=30)
    finally:
        runner.kill()
    assert archived(tmp_path / "out", "one.log") == "1\n"
    assert archived(tmp_path / "out", "hang.log").startswith("so far\n")
    statuses = [(step["name"], step["status"]) for step in read(tmp_path / "out")["steps"]]
    if number == signal.SIGTERM:
        assert status == 143 and statuses == [("one", "passed"), ("hang", "stopped")]
    else:
        assert statuses == [("one", "passed")]


def test_op_tests_run_and_are_counted(record, capsys):
    """The part itself, with an engine of the CPU."""
    paths = ["tests/ops/test_topk_gate.py"]
    made = parts.tests(record.logs, "portable and (ties or nan)", paths)
    results = check([python("start", "pass"), *made], record, 300)
    assert results[1].status == "passed", results[1].tail
    found = read(record.out)["steps"][1]["found"]
    assert found["passed"] > 0 and not found["failed"] and not found["crashed"]
    assert f"{found['passed']} passed, 0 failed" in capsys.readouterr().out
    assert "testsuite" in archived(record.out, "tests.xml")


BREAKING = """
import benchmarks.device_check.guard as guard

def test_before():
    pass

def test_breaks():
    guard.context_is_broken = lambda: True
    assert False, "an illegal instruction was encountered"

def test_after():
    assert not guard._broken
"""


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is missing")
def test_a_broken_context_ends_its_worker_and_the_rest_runs(record, tmp_path, monkeypatch):
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    monkeypatch.setattr(parts, "WORKERS", 1)
    made = parts.tests(record.logs, "test_", [str(tmp_path / "test_breaking.py")])
    results = check([python("start", "pass"), *made], record, 120)
    found = results[1].found
    assert results[1].status == "failed" and found["passed"] == 2, results[1].tail
    assert list(found["failed"]) == ["test_breaking::test_breaks"]
    assert "illegal instruction" in found["failed"]["test_breaking::test_breaks"]


def test_without_xdist_one_process_runs_until_the_context_breaks(
    record, tmp_path, monkeypatch, capsys
):
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = parts.tests(record.logs, "test_", [str(tmp_path / "test_breaking.py")])
    assert "-n" not in made[0].command
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert "pytest-xdist is missing" in said and "pytest-timeout is missing" in said
    results = check([python("start", "pass"), *made], record, 120)
    assert results[1].returncode == 17 and "broke the CUDA context" in results[1].tail
    assert results[1].found["passed"] == 1 and len(results[1].found["failed"]) == 1


def test_a_worker_that_ended_is_no_second_failure(tmp_path):
    case = '<testcase classname="tests.test_a" name="{}" time="1">{}</testcase>'
    ended = '<failure message="worker &apos;gw1&apos; crashed while running"/>'
    cases = [
        case.format("good", ""),
        case.format("bad", '<failure message="1 != 2&#10;more"/>'),
        case.format("bad", ended),
        case.format("gone", ended),
        case.format("no", '<skipped message="no GPU"/>'),
    ]
    path = tmp_path / "x.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    found = summary(path)
    assert (found["passed"], found["skipped"], found["reasons"]) == (1, 1, {"no GPU": 1})
    assert found["failed"] == {"test_a::bad": "1 != 2"} and list(found["crashed"]) == [
        "test_a::gone"
    ]
    path.write_text("<testsuites><testsu")
    assert "cannot be read" in steps.read_result(path)


def test_the_tests_that_are_named_are_there():
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined = ast.walk(ast.parse(path.read_text()))
        functions = [node for node in defined if isinstance(node, ast.FunctionDef)]
        wanted = {argument.arg for function in functions for argument in function.args.args}
        if wanted & {"engine", "gemm_engine"} and path.parent.name != "repo":  # recorded bits
            assert path.parent in (ROOT / parts.TESTS, ROOT / parts.DOOR), path
    command = parts.sanitize(Path("logs"))[0].command
    files = [word for word in command if word.endswith(".py")]
    assert len(files) == len(parts.MEMCHECK) and all((ROOT / name).exists() for name in files)
    assert parts.tests(Path("logs"))[0].command.count(parts.TESTS) == 1
    assert tuple(KERNELS) == parts.KERNELS and set(parts.PROFILED) <= set(KERNELS)
    assert set(parts.DEFAULT) <= set(parts.PARTS)
    for suite in suites.SUITES.values():
        assert suite.source.exists() and suite.tests().build_host


@pytest.mark.parametrize("part", sorted({*parts.PARTS} - {"tests", "sanitize"}))
def test_every_program_of_a_part_knows_its_arguments(part, monkeypatch, capsys):
    """A typing error would cost the first minute on the GPU."""
    for step in parts.PARTS[part](Path("logs")):
        module, *words = step.command[step.command.index("-m") + 1 :]
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        sys.modules.pop(module, None)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert not end.value.code
        said = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert flag in said, (step.name, flag)


def test_programs_run_on_a_cpu(tmp_path, monkeypatch, capsys):
    from benchmarks.device_check import host_calls, one_kernel, router, train_step

    def program_of(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        module.main()

    path = str(tmp_path / "found.json")
    monkeypatch.setattr(host_calls, "SECONDS", 1e-4)
    monkeypatch.setattr(host_calls, "IN_FLIGHT", 1)
    program_of(host_calls, "--device", "cpu", "--json", path)
    found = json.loads(Path(path).read_text())
    assert found["topk_gate"]["host_us"] > 0 and "torch: F.grouped_mm" in found
    program_of(router, "--device", "cpu", "--json", path)
    found = json.loads(Path(path).read_text())
    assert set(router.CASES) < set(found) and found["gate 1 x 384, 8"]["us"] > 0
    assert 8 < found["candidates of 4096 x 384, 8"]["mean"] < 10
    assert found["candidates of 4096 x 896, 16"]["exact"] < 0.01
    program_of(train_step, "--device", "cpu", "--preset", "tiny", "--json", path)
    found = json.loads(Path(path).read_text())
    assert len(found["steps"]) == train_step.STEPS and found["tokens_per_s"] > 0
    assert found["steps"][0]["optimizer_s"] > 0 and found["profile"]["torch_ops"] > 100
    for kernel in ("gate", "plan", "few"):
        program_of(one_kernel, kernel, "--device", "cpu")


def test_a_primitive_whose_halves_differ_is_named(tmp_path, monkeypatch):
    tests = suites.SUITES["primitives_sm90"].tests()
    monkeypatch.setattr(primitives, "load", lambda path: path.name)
    out = {"device": [1, 2, 3, 4], "host": [1, 2, 5, 4]}
    monkeypatch.setattr(tests, "run", lambda half, name: primitives.np.array(out[half]))
    halves = Path("device"), Path("host")
    said = primitives.same("primitives_sm90", "cluster", *halves)
    assert said == "1 of 4 words differ, first [2]"
    assert primitives.same("primitives_sm90", "cluster", halves[0], halves[0]) == "same"


HANGING = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks.device_check import primitives

def same(suite, name, device, host):
    time.sleep(600 if name == "hangs" else 0)
    return "same"

def suite(*names):
    one = {"tests": lambda: None, "missing": lambda tests: None, "names": lambda tests, host: names}
    return SimpleNamespace(**one)

primitives.SECONDS, primitives.same, primitives.load = 6, same, lambda path: None
primitives.SUITES = {"first": suite("hangs", "good"), "second": suite("late", "later")}
sys.exit(primitives.main())
"""


def test_a_primitive_that_hangs_leaves_the_next_suite_its_time(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-c", HANGING, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    hung = {"hangs": "no answer: its process hung or ended", "good": "same"}
    second = {"late": "same", "later": "same"}
    assert json.loads(path.read_text()) == {"first": hung, "second": second}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "tests", "speed"], "run: expected parts among tests, .*, got speed"),
        (["run", "profile", "--kernels", "x"], "run: --kernels: expected names among gate"),
        (["prepare", "--python", "/bin/false"], "prepare: (nvcc is not|--python: .* no answer)"),
    ],
)
def test_a_wrong_argument_is_a_sentence(arguments, sentence, capsys):
    assert program.main(arguments) == 2
    assert re.match(f"device_check {sentence}", capsys.readouterr().err)


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "kimi_ops"):
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
from pathlib import Path
from benchmarks.device_check import __main__ as program
program.gpu_missing, program.PREPARED = lambda: None, Path("/nowhere")
sys.exit(program.main(["run", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["profile", "--kernels", "gate"], "prepared.json is missing"),
        (["profile", "--kernels", "x"], "--kernels: expected names among gate"),
        ([], "prepared.json is missing"),
    ],
)
def test_a_run_itself_needs_neither_torch_nor_kimi_ops(words, sentence):
    command = [sys.executable, "-c", HIDDEN, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


@pytest.mark.skipif(NO_GPU is None, reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert program.main(["run", "tests", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert "no GPU here" in capsys.readouterr().err


def test_run_from_its_arguments_to_its_files(tmp_path, monkeypatch, capsys):
    """A GPU and its parts are faked; everything between is the program's own."""
    monkeypatch.setattr(program, "gpu_missing", lambda: None)
    monkeypatch.setattr(program, "install", lambda folder, about: None)
    about = {"commit": "abc", "date": "today", "files": {}}
    monkeypatch.setattr(program, "prepared", lambda folder: about)
    monkeypatch.setattr(parts, "start", lambda logs: python("start", "pass"))
    monkeypatch.setitem(parts.PARTS, "tests", lambda logs: [python("tests", "print('ok')")])
    bad = python("bad", "raise SystemExit(3)")
    monkeypatch.setitem(parts.PARTS, "bench", lambda logs: [bad])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert program.main(["run", "tests"]) == 0
    report = read(tmp_path / "out")
    assert [step["name"] for step in report["steps"]] == ["start", "tests"]
    assert report["prepared"] == about and report["machine"]["commit"]
    assert program.main(["run", "tests", "bench", "--out", str(tmp_path / "other")]) == 1
    assert read(tmp_path / "other")["steps"][2]["returncode"] == 3
    assert "logs.tgz" in capsys.readouterr().out
    absent = python("absent", "pass", needs="no-such-program")
    monkeypatch.setitem(parts.PARTS, "bench", lambda logs: [absent])
    assert program.main(["run", "bench"]) == 1
    assert program.main(["run", "tests", "--seconds", "0.5"]) == 1
    assert "== no time    start" in capsys.readouterr().out
