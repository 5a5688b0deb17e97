# SPDX-License-Identifier: MIT
"""``kimi-ops bench``."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import typer

from kimi_ops.cli.options import fail


def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout; arguments, --help too, are those of python -m
    benchmarks."""
    sys.path.insert(0, str(Path.cwd()))
    if importlib.util.find_spec("benchmarks") is None or not Path("benchmarks").is_dir():
        raise fail(
            f"bench: expected the folder benchmarks of a source checkout in {Path.cwd()}; run it "
            "there"
        )
    sys.argv = ["benchmarks", *context.args]
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
