# SPDX-License-Identifier: MIT
"""What the site is made of: pictures and plots as their programs draw them, a page for every op and
every public name. `make docs` builds it, where a warning is an error."""

import re
import runpy
from pathlib import Path

import pytest

import kimi_ops
from benchmarks.plot import drawn as plots

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
OPS = [name for name in PAGES if name.startswith("ops/")]


@pytest.mark.parametrize("folder", ["figures", "plots"])
def test_pictures_are_what_their_program_draws(folder):
    found = {path.name: path.read_text() for path in (DOCS / folder).iterdir()}
    drawn = (
        plots() if folder == "plots" else runpy.run_path(str(DOCS / "site/figures.py"))["drawn"]()
    )
    assert found.keys() == drawn.keys()
    assert [name for name in drawn if found[name] != drawn[name]] == []
    shown = re.findall(
        rf"\({folder}/([\w-]+\.svg)\)|\(\.\./{folder}/([\w-]+\.svg)\)", "".join(PAGES.values())
    )
    assert {name for pair in shown for name in pair if name} == drawn.keys(), "a picture on no page"


@pytest.mark.parametrize("page", OPS)
def test_the_page_of_an_op_has_its_parts(page):
    text = PAGES[page]
    assert "```python" in text and re.search(r"^!\[.+\]\(\.\./", text, re.MULTILINE), "a picture"
    assert re.search(r"^## .*(error|Error)", text, re.MULTILINE) and re.search("[Bb]its", text)
    assert re.search(r"bytes|operations|MB", text), "what it costs"
    assert text.rstrip().splitlines()[-1].startswith("::: kimi_ops."), "the API at its end"


@pytest.mark.parametrize("page", PAGES)
def test_every_renderer_sees_lists_and_code(page):
    """A list has a heading or a blank line above it; code below a list is fenced, or it would be a
    paragraph of its last item."""
    before, listed = "#", False
    for line in re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL).splitlines():
        item = line.startswith("- ")
        assert not item or listed or before.startswith("#") or not before.strip(), line
        assert not (listed and not before.strip() and re.match(r" {4,}[^| ]", line)), line
        listed = item or (listed and (line.startswith("  ") or not line.strip()))
        before = line


def test_every_public_name_is_documented_on_one_page():
    named = re.findall(r"^::: kimi_ops\.(\w+)$", "\n".join(PAGES.values()), re.MULTILINE)
    missing = set(kimi_ops.__all__) - set(named)
    assert not missing, f"on no page; add a line `::: kimi_ops.NAME` below ## API: {missing}"
    assert sorted(named) == sorted(kimi_ops.__all__), "twice, or gone"


def test_every_page_has_its_place():
    """Pages that the site makes of files elsewhere are not here."""
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert len(listed) == len(set(listed))
    made = set(listed) - PAGES.keys()
    assert made == {"index.md", "changelog.md", "contributing.md"}
    missing = PAGES.keys() - set(listed)
    assert not missing, f"pages that nobody finds; add them to nav in mkdocs.yml: {missing}"
