# SPDX-License-Identifier: MIT
"""Runs CMake for the native library; everything else stands in pyproject.toml and CMakeLists.txt.

``python setup.py build_ext --inplace`` (what editable installs do) leaves libkimi_ops.so and _C
in python/kimi_ops. The environment variables KIMI_OPS_CUDA (auto | on | off), KIMI_OPS_TESTS (ON |
OFF) and CMAKE_ARGS reach CMake.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        destination = ROOT / "python" if in_place else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"python-{sys.implementation.cache_tag}"
        switches = ["-DCMAKE_BUILD_TYPE=Release", "-DKIMI_OPS_PYTHON=on"]
        switches += [
            f"-D{name}={os.environ[name]}"
            for name in ("KIMI_OPS_CUDA", "KIMI_OPS_TESTS")
            if name in os.environ
        ]
        switches += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # An interrupted or moved environment leaves dead paths in the cache: start from none.
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh"]
        subprocess.check_call([*configure, f"-DPython_EXECUTABLE={sys.executable}", *switches])
        subprocess.check_call(["cmake", "--build", str(build)])
        if os.environ.get("KIMI_OPS_TESTS", "OFF") == "OFF":
            for stale in build.glob("_simt*.so"):  # the tests would take it for this build's
                stale.unlink()
        install = ["cmake", "--install", str(build), "--component", "library"]
        subprocess.check_call([*install, "--prefix", str(destination / "kimi_ops")])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("kimi_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
