# SPDX-License-Identifier: MIT
"""The counts in docs/kimi_k2.md; tests/repo/test_docs.py runs its examples."""

from pathlib import Path

from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.models.kimi_k2.parameters import parameter_report

PAGE = Path(__file__).parents[2] / "docs" / "kimi_k2.md"


def test_counts_of_the_page():
    report = parameter_report(KimiK2Config.k2())
    numbers = {f"{value:,}".replace(",", " ") for value in (report.total, report.parameters)}
    numbers |= {f"{part.total:,}".replace(",", " ") for part in report.parts[5:9]}
    numbers |= {f"{report.active:,}".replace(",", " "), "70 272"}
    assert all(number in PAGE.read_text(encoding="utf-8") for number in numbers)
