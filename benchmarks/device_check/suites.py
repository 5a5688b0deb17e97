# SPDX-License-Identifier: MIT
"""The primitives of csrc/device: the modules of tests/gpu that know how to build and compare both
halves of each."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT

PLACE = ROOT / "tests" / "gpu"


@dataclass(frozen=True)
class Suite:
    name: str  # of the .cu file, and of the module with test_ before it
    switch: str  # of nvcc
    names: Callable[[Any, ctypes.CDLL], list[str]]  # of its primitives: (module, host half)
    missing: Callable[[Any], str | None]  # why the device half cannot run here

    @property
    def source(self) -> Path:
        return PLACE / f"{self.name}.cu"

    def tests(self) -> Any:
        if str(PLACE) not in sys.path:
            sys.path.insert(0, str(PLACE))
        return import_module(f"test_{self.name}")


_ALL = (
    Suite(
        "primitives",
        "-gencode=arch=compute_80,code=[sm_80,sm_90]",
        lambda tests, host: list(tests.OUTPUTS),
        lambda tests: tests.gpu_missing(),
    ),
    Suite(
        "primitives_sm90",
        "-gencode=arch=compute_90a,code=sm_90a",
        lambda tests, host: tests.names(host),
        lambda tests: tests.hopper_missing(),
    ),
)
SUITES = {suite.name: suite for suite in _ALL}


def load(path: Path) -> ctypes.CDLL:
    """One half."""
    library = SUITES["primitives"].tests().load(path)
    assert isinstance(library, ctypes.CDLL)
    return library
