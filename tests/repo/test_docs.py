# SPDX-License-Identifier: MIT
"""The examples run as written: Python blocks of the README and docs, and docstrings."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import kimi_ops

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(kimi_ops.__path__, "kimi_ops.")
    if not module.name.endswith(("._C", "libkimi_ops"))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    if "import jax" in block:
        pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name.startswith("kimi_ops.jax"):
        pytest.importorskip("jax")
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page):
    for name in re.findall(r"`(?:torch\.ops\.)?kimi_ops((?:\.\w+)+)[`(]", page.read_text()):
        if not name.endswith(".h"):
            pkgutil.resolve_name(f"kimi_ops{name}")


def test_the_readme_lists_every_variable_that_is_read_at_run_time():
    sources = [*(ROOT / "csrc").rglob("*.c*"), *(ROOT / "python/kimi_ops").rglob("*.py")]
    read = r'(?:getenv\(|environ\.get\(|environ\[)"(KIMI_OPS_\w+)"'
    found = {name for path in sources for name in re.findall(read, path.read_text())}
    table = re.findall(r"^\| `(KIMI_OPS_\w+)=", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(found)
