# SPDX-License-Identifier: MIT
"""What the site has beyond docs/: pages that stand elsewhere in the tree, and the files that pages
point to.

The README, the changelog and the like are pages as they are. A link that leaves docs/ leads to a
page with the text of the file, or with the names of the folder's files. Behind the functions that a
page documents stand the errors of wrong calls, as the tests have them on record.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md",
}  # fmt: skip
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
API = re.compile(r"^::: kimi_ops\.(\w+)$", re.MULTILINE)
RECORD = json.loads((ROOT / "tests/repo/messages.json").read_text())
LANGUAGES = {".cu": "cuda", ".cuh": "cuda", ".h": "cpp", ".md": "markdown", ".yml": "yaml"}


def _source(page: str) -> PurePosixPath:
    """The path below the root of what a page is made of."""
    return PurePosixPath(PAGES.get(page, f"docs/{page}"))


def _page(target: str) -> str:
    """The page that shows a file or folder of the tree."""
    for page, source in PAGES.items():
        if target == source:
            return page
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}.md"


def _targets(page: str, markdown: str) -> dict[str, str]:
    """The links of a page to files: as they are written, and the paths below the root."""
    folder, written = _source(page).parent, {match[1] for match in LINK.finditer(markdown)}
    return {one: os.path.normpath(folder / one) for one in written if "://" not in one}


def _text(path: Path) -> str:
    """A page with a file's text, or with links to the files of a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        return "\n".join([f"# {name}", *(f"- [{file}]({path.name}/{file}.md)" for file in files)])
    language = LANGUAGES.get(path.suffix, path.suffix.removeprefix("."))
    return f"# {name}\n~~~~ {language}\n{path.read_text()}\n~~~~\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    shown: set[Path] = set()
    for file in files.documentation_pages():
        targets = _targets(file.src_uri, file.content_string).values()
        shown |= {ROOT / target for target in targets if _page(target).startswith("source/")}
    for folder in [path for path in shown if path.is_dir()]:
        shown |= {file for file in folder.iterdir() if file.is_file()}
    for path in sorted(path for path in shown if path.exists()):
        page = _page(path.relative_to(ROOT).as_posix())
        made = File.generated(config, page, content=_text(path))
        made.inclusion = made.inclusion.NOT_IN_NAV
        files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    targets = _targets(uri, markdown)

    def led(match: re.Match[str]) -> str:
        if match[1] not in targets:
            return match[0]
        place = os.path.relpath(_page(targets[match[1]]), PurePosixPath(uri).parent)
        return f"]({place}{match[2] or ''})"

    return LINK.sub(led, markdown) + _errors(API.findall(markdown))


def _errors(functions: list[str]) -> str:
    """What wrong calls of the functions say, as a folded table."""
    rows = [
        f"    | `{call}` | `{error}` |"
        for call, error in RECORD.items()
        if call.split("(")[0] in functions and ": " in error
    ]
    head = ["", f'??? note "What {len(rows)} wrong calls say"', "    | call | error |"]
    return "\n".join([*head, "    |---|---|", *rows, ""]) if rows else ""
