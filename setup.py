# SPDX-License-Identifier: MIT
"""Runs CMake for the native library; everything else stands in pyproject.toml and CMakeLists.txt.

``python setup.py build_ext --inplace`` (what editable installs do) leaves libkimi_ops.so and _C
in python/kimi_ops. The environment variables KIMI_OPS_CUDA (auto | on | off), KIMI_OPS_TESTS (OFF |
PYTHON | ON) and CMAKE_ARGS reach CMake. Object files are kept from build to build, whatever
environment asks: only what changed is compiled again.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CACHED_PATH = re.compile(r"^[^#/][^:]*:(?:FILEPATH|PATH)=(.+)$", re.MULTILINE)


def configure(build: Path, switches: list[str], arguments: list[str]) -> None:
    """CMake's configuration, from its cache only if that was filled with the same `arguments`,
    tools and flags and every path in it still exists: those of a moved or temporary environment do
    not. The `switches` are given every time: none stays in the cache that nobody asks for now."""
    cache, request = build / "CMakeCache.txt", build / "request.txt"
    read = re.compile(
        "C(C|XX|UDACXX|UDAARCHS)|(C|CXX|CUDA|LD)FLAGS|(CMAKE|CUDA|NVCC)_.*|CUDAToolkit_ROOT"
    )
    names = sorted(name for name in os.environ if read.fullmatch(name) and name != "CMAKE_ARGS")
    asked = [*arguments, *(f"{name}={os.environ[name]}" for name in names)]
    for tool in ("cmake", "ninja", "cc", "c++", "nvcc"):
        if found := shutil.which(tool):
            asked.append(f"{os.path.realpath(found)} {os.path.getmtime(found)}")
    known = request.exists() and request.read_text() == "\n".join(asked) and cache.exists()
    paths = CACHED_PATH.findall(cache.read_text()) if known else []
    if not known or any(Path(p).is_absolute() and not Path(p).exists() for p in paths):
        cache.unlink(missing_ok=True)
        for compilers in build.glob("CMakeFiles/*/CMakeCXXCompiler.cmake"):
            shutil.rmtree(compilers.parent)  # not the object files, which lie beside it
    request.unlink(missing_ok=True)  # an interrupted configuration is not one to go on from
    subprocess.check_call(["cmake", "-B", str(build), *switches, *arguments])
    request.write_text("\n".join(asked))


class CMakeBuild(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        destination = ROOT / "python" if in_place else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"python-{sys.implementation.cache_tag}"
        tests = os.environ.get("KIMI_OPS_TESTS", "OFF")
        configure(
            build,
            [f"-DKIMI_OPS_CUDA={os.environ.get('KIMI_OPS_CUDA', 'auto')}",
             f"-DKIMI_OPS_TESTS={tests}"],
            ["-S", str(ROOT), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DKIMI_OPS_PYTHON=on",
             f"-DPython_EXECUTABLE={sys.executable}",
             *shlex.split(os.environ.get("CMAKE_ARGS", ""))],
        )  # fmt: skip
        subprocess.check_call(["cmake", "--build", str(build)])
        if tests == "OFF":
            for stale in build.glob("_simt*.so"):  # the tests would take it for this build's
                stale.unlink()
        install = ["cmake", "--install", str(build), "--component", "library"]
        subprocess.check_call([*install, "--prefix", str(destination / "kimi_ops")])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("kimi_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
