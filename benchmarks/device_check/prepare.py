# SPDX-License-Identifier: MIT
"""Builds here what runs on the other machine, and lays it out in one folder.

The library and `_C` for the Python named, with machine code for sm_80 and sm_90 and the kernels of
sm_90a; both halves of the primitives of tests/gpu; clocks.so of clocks.cu; and `prepared.json`,
which says what they are.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.checkout import MANIFEST, ROOT, commit, sources
from benchmarks.device_check.machine import Refused
from benchmarks.device_check.suites import SUITES

VERSION = "3.12"
ARCHITECTURES = "80-real;90-real"
CLOCKS = ROOT / "benchmarks" / "device_check" / "clocks.cu"
DESCRIBE = (
    "import json, platform, sysconfig; print(json.dumps({'python': platform.python_version(), "
    "'soabi': sysconfig.get_config_var('SOABI')}))"
)
Call = Callable[..., object]


def describe(python: str) -> dict[str, str] | None:
    """Version and ABI of an interpreter, or None where it does not answer."""
    command = [python, "-c", DESCRIBE]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return dict(json.loads(answer.stdout)) if answer.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def find_python(given: str | None) -> tuple[str, dict[str, str]]:
    """The interpreter to build for: the one given, or the first 3.12 that answers."""
    if given is not None:
        facts = describe(given)
        if facts is None:
            raise Refused(f"--python: expected a Python interpreter, got {given}: no answer")
        if tuple(map(int, facts["python"].split(".")[:2])) < (3, 11):
            raise Refused(f"--python: expected Python 3.11 or later, got {facts['python']}")
        return given, facts
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{VERSION}"), sys.executable]
    candidates += sorted(glob.glob(f"{pyenv}/versions/{VERSION}.*/bin/python"), reverse=True)
    for candidate in filter(None, candidates):
        facts = describe(candidate)
        if facts is not None and facts["python"].startswith(f"{VERSION}."):
            return candidate, facts
    raise Refused(
        f"--python: no Python {VERSION} on the PATH or in {pyenv}: name an interpreter of the "
        "version that the machine with the GPU has"
    )


def prepare(folder: Path, python: str | None, call: Call = subprocess.check_call) -> None:
    """Fills `folder`; `call` runs the commands."""
    if shutil.which("nvcc") is None:
        raise Refused("nvcc is not on the PATH: put the CUDA toolkit's bin folder there")
    if shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        raise Refused(f"expected a C++ compiler, {compiler} is not on the PATH: set CXX to one")
    interpreter, facts = find_python(python)
    facts["sources"] = sources()  # before the build: a change meanwhile is one
    print(f"for Python {facts['python']} ({interpreter})", flush=True)
    tools, build = (ROOT / "build" / f"{kind}-{facts['soabi']}" for kind in ("tools", "gpu"))
    try:
        install_tools(tools, interpreter, call)
        build_library(build, tools, folder, call)
        build_primitives(folder)
    except subprocess.CalledProcessError as error:
        words = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd))
        raise Refused(f"a command ended with {error.returncode}; see above: {words}") from None
    write_manifest(folder, facts)


def install_tools(tools: Path, interpreter: str, call: Call) -> None:
    """What pyproject.toml needs for a build, in an environment of that interpreter."""
    done = tools / "ready"
    if done.exists():
        return
    with open(ROOT / "pyproject.toml", "rb") as file:
        needed = tomllib.load(file)["build-system"]["requires"]
    call([interpreter, "-m", "venv", "--clear", str(tools)])
    call([str(tools / "bin" / "python"), "-m", "pip", "install", "--quiet", *needed])
    done.touch()


def build_library(build: Path, tools: Path, folder: Path, call: Call) -> None:
    environment = os.environ | {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DKIMI_OPS_CUDA=on", "-DKIMI_OPS_PYTHON=on"]
    configure += ["-DKIMI_OPS_TESTS=OFF", f"-DPython_EXECUTABLE={tools / 'bin' / 'python'}"]
    call([*configure, f"-DKIMI_OPS_GENERIC_ARCHITECTURES={ARCHITECTURES}"], env=environment)
    call(["cmake", "--build", str(build)], env=environment)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install = ["cmake", "--install", str(build), "--component", "library", "--strip"]
    call([*install, "--prefix", str(folder)], env=environment)
    shutil.rmtree(folder / "include", ignore_errors=True)


def build_primitives(folder: Path) -> None:
    """Both halves of every suite, side by side."""
    with ThreadPoolExecutor() as pool:
        halves = []
        for suite in SUITES.values():
            tests = suite.tests()
            halves.append(pool.submit(tests.build_host, suite.source, folder))
            halves.append(pool.submit(tests.build_gpu, suite.source, folder, suite.switch))
        build = SUITES["primitives_sm90"].tests().build_gpu
        clocks = pool.submit(build, CLOCKS, folder, SUITES["primitives_sm90"].switch)
        for half in [*halves, clocks]:
            half.result()
    (folder / f"{CLOCKS.stem}_gpu.so").rename(folder / f"{CLOCKS.stem}.so")


def write_manifest(folder: Path, facts: dict[str, str]) -> None:
    nvcc = subprocess.check_output(["nvcc", "--version"], text=True).strip().splitlines()[-1]
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    about = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
    about |= {"nvcc": nvcc, "architectures": f"{ARCHITECTURES};90a-real"}
    (folder / MANIFEST).write_text(json.dumps(about | {"files": files}, indent=1) + "\n")
    size = sum(files.values()) / 2**20
    print(f"{folder}: {len(files)} files, {size:.0f} MiB, commit {about['commit']}")
