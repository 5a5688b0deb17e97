# SPDX-License-Identifier: MIT
"""pytest's JUnit XML in a few numbers and names."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any


def summary(path: Path) -> dict[str, Any]:
    """`failed` and `crashed` (the worker's process ended) map a test's name to the first line of
    its message; a test that failed and then ended its worker counts once, as failed."""
    passed, reasons = 0, Counter[str]()
    failed: dict[str, str] = {}
    crashed: dict[str, str] = {}
    seconds = 0.0
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        seconds += float(case.get("time", 0))
        trouble = case.find("failure")
        trouble = case.find("error") if trouble is None else trouble
        skipped = case.find("skipped")
        if trouble is not None:
            line = (trouble.get("message") or trouble.text or "").strip().split("\n")[0][:300]
            ended = line.startswith("worker ") or "crashed while running" in line
            (crashed if ended else failed).setdefault(name, line)
        elif skipped is not None:
            reasons[(skipped.get("message") or "")[:120]] += 1
        else:
            passed += 1
    crashed = {name: line for name, line in crashed.items() if name not in failed}
    return {
        "passed": passed,
        "failed": failed,
        "crashed": crashed,
        "skipped": sum(reasons.values()),
        "reasons": dict(reasons.most_common(20)),
        "seconds_of_tests": round(seconds, 1),
    }
