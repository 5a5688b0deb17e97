# SPDX-License-Identifier: MIT
"""What the machine with a GPU gets: its layout, and when it is refused."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from benchmarks import checkout
from benchmarks.checkout import MANIFEST, ROOT
from benchmarks.device_check import __main__ as program
from benchmarks.device_check import machine, prepare, suites

SOABI = sysconfig.get_config_var("SOABI")


def test_prepare_lays_out_what_has_to_travel(tmp_path, monkeypatch, capsys):
    """With compilers that only touch their output."""
    tools, folder = tmp_path / "bin", tmp_path / "prepared"
    tools.mkdir()
    touch = '#!/bin/sh\necho release 13.0\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo x > "$2"; '
    for name in ("nvcc", "fake-g++"):
        (tools / name).write_text(f"{touch} shift; done\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CXX", str(tools / "fake-g++"))
    monkeypatch.setattr(suites.SUITES["primitives"].tests(), "load", lambda path: None)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    calls = []

    def call(command, env=None):
        calls.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        if "--install" in command:
            for name in ("libkimi_ops.so", f"_C.{SOABI}.so", "include/kimi_ops.h"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("x")

    prepare.prepare(folder, sys.executable, call)
    names = {"libkimi_ops.so", f"_C.{SOABI}.so", MANIFEST, "clocks.so"}
    names |= {f"{suite}_{half}.so" for suite in suites.SUITES for half in ("host", "gpu")}
    assert {path.name for path in folder.iterdir()} == names
    about = machine.prepared(folder)
    assert about["soabi"] == SOABI and about["nvcc"] == "release 13.0"
    assert about["commit"] != "unknown" and set(about["files"]) == names - {MANIFEST}
    configure = next(command for command in calls if "-G" in command)
    assert "-DKIMI_OPS_GENERIC_ARCHITECTURES=80-real;90-real" in configure
    assert any("pybind11>=2.13" in command for command in calls)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "sources", lambda: "another")
        with pytest.raises(machine.Refused, match=r"\(another\): run `python -m .* prepare` again"):
            machine.prepared(folder)
    calls.clear()
    prepare.prepare(folder, sys.executable, call)
    assert not any("venv" in command for command in calls), "the tools are there"

    def fails(command, env=None):
        raise subprocess.CalledProcessError(1, command)

    with pytest.raises(machine.Refused, match="a command ended with 1; see above: cmake -S"):
        prepare.prepare(folder, sys.executable, fails)


def test_what_was_not_prepared_for_this_python_is_refused(tmp_path):
    with pytest.raises(machine.Refused, match="is missing: run `python -m .* prepare` on"):
        machine.prepared(tmp_path)
    about = {"soabi": "cpython-399-vax", "python": "3.99.1", "files": {"libkimi_ops.so": 1}}
    (tmp_path / MANIFEST).write_text(json.dumps(about))
    with pytest.raises(machine.Refused, match=r"libkimi_ops.so did not arrive"):
        machine.prepared(tmp_path)
    (tmp_path / "libkimi_ops.so").touch()
    with pytest.raises(machine.Refused, match=f"cpython-399-vax, this Python is {SOABI}"):
        machine.prepared(tmp_path)


def test_every_source_changes_the_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    seen = {checkout.sources()}
    names = ["CMakeLists.txt", "cmake/a.cmake", "csrc/a.h", "csrc/x/y/b.cu", "tests/gpu/c.cu"]
    for count, name in enumerate([*names, "tests/simt/d.cpp"], 2):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        seen.add(checkout.sources())
        assert len(seen) == count, name
    (tmp_path / "tests/gpu/test_c.py").write_text("no source of what is built")
    assert checkout.sources() in seen


def test_where_git_is_missing_the_commit_is_what_prepare_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "PREPARED", tmp_path)
    assert re.match("[0-9a-f]{7}", checkout.commit())
    monkeypatch.setenv("PATH", "/nowhere")
    assert checkout.commit() == "unknown"
    (tmp_path / MANIFEST).write_text('{"commit": "abc1234"}')
    assert checkout.commit() == "abc1234"


def test_without_nvcc_prepare_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert program.main(["prepare"]) == 2
    assert "nvcc is not on the PATH" in capsys.readouterr().err


def test_without_a_compiler_prepare_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert program.main(["prepare"]) == 2
    assert "no-such-compiler is not on the PATH: set CXX" in capsys.readouterr().err
