# SPDX-License-Identifier: MIT
"""A torch that is too old is refused at import, by name."""

import tomllib
from pathlib import Path

import pytest

from kimi_ops import _native

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.0", "2.9.0a0+git1234"])
def test_an_older_torch_is_refused(version):
    with pytest.raises(ImportError, match=r"^kimi_ops: torch: expected 2.11 or later, got .*; pip"):
        _native.check_version(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.11.0a0+git1234", "3.0", "unknown"])
def test_others_are_taken(version):
    _native.check_version(version)


def test_the_package_asks_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={'.'.join(map(str, _native.TORCH))}" in project["dependencies"]
