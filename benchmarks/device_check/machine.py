# SPDX-License-Identifier: MIT
"""What is known of the machine that runs, and whether it can."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from benchmarks.checkout import MANIFEST, ROOT, commit, sources

FIELDS = [
    "name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem",
    "clocks.current.sm", "power.limit", "temperature.gpu",
]  # fmt: skip
PREPARE = "python -m benchmarks.device_check prepare"


class Refused(Exception):
    """A sentence: why nothing can be built or run, and what mends it."""


def gpu_missing() -> str | None:
    """Why there is nothing to check here, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no GPU here: libcuda.so.1 cannot be loaded"
    count = ctypes.c_int()
    if (
        driver.cuInit(0) != 0
        or driver.cuDeviceGetCount(ctypes.byref(count)) != 0
        or not count.value
    ):
        return "no GPU here: the driver finds no device"
    return None


def prepared(folder: Path) -> dict[str, Any]:
    """What `prepare` wrote down, if it built these sources and for this Python."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise Refused(
            f"{manifest} is missing: run `{PREPARE}` on a machine with nvcc, and bring {folder} "
            "along with the checkout"
        )
    about: dict[str, Any] = json.loads(manifest.read_text())
    missing = [name for name in about["files"] if not (folder / name).exists()]
    if missing:
        raise Refused(f"{folder}: {', '.join(missing)} did not arrive: bring the whole folder")
    here = sysconfig.get_config_var("SOABI")
    if about["soabi"] != here:
        raise Refused(
            f"{folder} was built for {about['soabi']}, this Python is {here}: run with Python "
            f"{about['python']}, or `{PREPARE} --python PATH` with this version"
        )
    if (was := about.get("sources")) != (now := sources()):
        raise Refused(
            f"{folder} was built from other sources (hash {was}) than the checkout's ({now}): "
            f"run `{PREPARE}` again"
        )
    return about


def install(folder: Path, about: dict[str, Any]) -> None:
    """Puts the library and `_C` where `import kimi_ops` finds them."""
    for name in about["files"]:
        if name.startswith(("libkimi_ops", "_C.")):
            shutil.copy2(folder / name, ROOT / "python" / "kimi_ops" / name)


def output_of(*command: str) -> str:
    try:
        return subprocess.check_output(command, text=True, cwd=ROOT, timeout=20).strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def facts() -> dict[str, Any]:
    answer = output_of("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader")
    values = answer.splitlines()[0].split(", ")
    gpu = dict(zip(FIELDS, values, strict=True)) if len(values) == len(FIELDS) else answer
    return {
        "gpu": gpu,
        "nvcc": output_of("nvcc", "--version").splitlines()[-1],
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }
