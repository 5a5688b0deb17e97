# SPDX-License-Identifier: MIT
"""The examples in docs/kimi_k2.md and in the docstrings of the model run as written."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from kimi_ops.models import kimi_k2

PAGE = Path(__file__).parents[1] / "docs" / "kimi_k2.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
PARTS = [f"{kimi_k2.__name__}.{part.name}" for part in pkgutil.iter_modules(kimi_k2.__path__)]
OPS = [f"kimi_ops.{name}" for name in ("permute", "grouped_gemm", "fused_experts")]


def test_the_page_has_examples():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("code", BLOCKS)
def test_examples_of_the_page(code):
    exec(compile(code, str(PAGE), "exec"), {})


@pytest.mark.parametrize("name", PARTS + OPS)
def test_examples_of_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_counts_of_the_page():
    from kimi_ops.models.kimi_k2.parameters import parameter_report

    report = parameter_report(kimi_k2.KimiK2Config.k2())
    numbers = {f"{value:,}".replace(",", " ") for value in (report.total, report.parameters)}
    numbers |= {f"{part.total:,}".replace(",", " ") for part in report.parts[5:9]}
    numbers |= {f"{report.active:,}".replace(",", " "), "70 272"}
    assert all(number in PAGE.read_text(encoding="utf-8") for number in numbers)
