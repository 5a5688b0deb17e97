# SPDX-License-Identifier: MIT
"""Which part of the house may know which: nothing in a circle, operators registered in one place.

A circle here is a largest set of files (folders, modules) each of which includes all others, by
steps. What is KNOWN must be there: whoever opens a circle takes it off the list.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC, PYTHON = ROOT / "csrc", ROOT / "python"
OPERATORS = "kimi_ops/operators/"  # the package that registers torch operators

KNOWN: dict[str, set[tuple[str, ...]]] = {
    # the parts of the C API: each can be included alone
    "files of csrc": {("kimi_ops.h", "kimi_ops_experts.h", "kimi_ops_optimizer.h")},
    "folders of csrc": set(),
    "modules": set(),
    "packages": set(),
}
# The packages from the top down, beside each other in a line: each knows only those of lower lines.
LAYERS = """
kimi_ops.__main__
kimi_ops.cli
kimi_ops.agentic
kimi_ops.train
kimi_ops.plan
kimi_ops.models.kimi_k2.chat kimi_ops.compat.grouped_gemm
kimi_ops.models.kimi_k2 kimi_ops.models kimi_ops.interop kimi_ops.compat
kimi_ops.models.kimi_k2.checkpoint
kimi_ops.models.kimi_k2.config
kimi_ops
kimi_ops._lazy
kimi_ops._public
kimi_ops.facts
kimi_ops.gpu kimi_ops.invariance kimi_ops.memory
kimi_ops.numpy kimi_ops.jax
kimi_ops.arrays
kimi_ops.nn kimi_ops.optim
kimi_ops.parallel
kimi_ops.moe
kimi_ops.operators
kimi_ops.reference
kimi_ops._native kimi_ops.formats kimi_ops.routing
kimi_ops._library kimi_ops._check kimi_ops._forms
kimi_ops._C kimi_ops._autocast kimi_ops._arguments kimi_ops._program kimi_ops.building
kimi_ops.activations kimi_ops.choices
"""
Graph = dict[str, set[str]]


def circles(graph: Graph) -> set[tuple[str, ...]]:
    """The strongly connected components of more than one node, each sorted."""
    reach = {node: _reachable(graph, node) for node in graph}
    found = set()
    for node, seen in reach.items():
        members = sorted(other for other in seen if node in reach.get(other, ()))
        if len({node, *members}) > 1:
            found.add(tuple(members))
    return found


def _reachable(graph: Graph, node: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[node])
    while waiting:
        if (other := waiting.pop()) not in seen:
            seen.add(other)
            waiting += graph.get(other, ())
    return seen


def merged(graph: Graph, place: dict[str, str]) -> Graph:
    """The graph of the places (folders, packages) that nodes lie in."""
    result: Graph = {}
    for node, others in graph.items():
        outside = {place[other] for other in others if place[other] != place[node]}
        result.setdefault(place[node], set()).update(outside)
    return result


def includes() -> Graph:
    """The files of csrc/ that each one includes, by path below csrc/."""
    graph: Graph = {}
    for path in CSRC.rglob("*"):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
            found = [p for n in names for p in (CSRC / n, path.parent / n) if p.exists()]
            graph[path.relative_to(CSRC).as_posix()] = {
                p.resolve().relative_to(CSRC).as_posix() for p in found
            }
    return graph


def imports() -> Graph:
    """The modules of kimi_ops that each one imports, wherever in the file it does."""
    paths = {
        _module(path): path
        for path in (PYTHON / "kimi_ops").rglob("*.py*")
        if path.suffix in (".py", ".pyi")
    }
    graph: Graph = {}
    for module, path in paths.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & paths.keys()
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    graph[module] |= {inner if inner in paths else node.module} & paths.keys()
    return graph


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PYTHON).with_suffix("").parts).removesuffix(".__init__")


def _package(module: str) -> str:
    """A module right below kimi_ops stands for itself."""
    folder = PYTHON / module.replace(".", "/")
    inside = folder.is_dir() or module.count(".") == 1
    return module if inside else module.rpartition(".")[0]


def graphs() -> dict[str, Graph]:
    files, modules = includes(), imports()
    folders = {name: name.rpartition("/")[0] or "csrc" for name in files}
    return {
        "files of csrc": files,
        "folders of csrc": merged(files, folders),
        "modules": modules,
        "packages": merged(modules, {name: _package(name) for name in modules}),
    }


@pytest.mark.parametrize("kind", KNOWN)
def test_nothing_is_in_a_circle(kind):
    found = circles(graphs()[kind])
    assert found - KNOWN[kind] == set(), "new circles"
    assert KNOWN[kind] - found == set(), "these are open now: take them off KNOWN"


def test_packages_know_lower_layers_only():
    levels = {name: n for n, line in enumerate(LAYERS.split("\n")) for name in line.split()}
    known = graphs()["packages"]
    assert known.keys() == levels.keys(), "a package without a place in LAYERS, or one that is gone"
    upwards = {(a, b) for a, others in known.items() for b in others if levels[b] <= levels[a]}
    assert not upwards


def test_folders_know_lower_layers_only():
    """Ops may build on other ops: the circles say that two do not build on each other."""
    below = ("gemm", "cpu device", "math", "common", "csrc")  # csrc: the headers of the C API
    levels = {name: n for n, line in enumerate(below) for name in line.split()}

    def level(folder: str) -> int:
        return -2 if folder == "bindings" else levels.get(folder.split("/")[0], -1)

    graph = graphs()["folders of csrc"]
    upwards = {(a, b) for a, others in graph.items() for b in others if level(b) < level(a)}
    assert not upwards
    assert levels.keys() <= {name.split("/")[0] for name in graph}, "a folder that is gone"


def test_circles_are_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles(graph) == {("b", "c")}
    graph["d"] = {"a"}
    assert circles(graph) == {("a", "b", "c", "d")}


def test_operators_are_registered_in_one_package():
    registering = re.compile(
        r"\btorch\.library\b|^from torch import .*\blibrary\b"
        r"|\b(_native|registry)\.(register|define|library)\b"
        r"|^from kimi_ops\.(_native|operators\.registry) import .*\b(register|define|library)\b",
        re.MULTILINE,
    )
    found = {
        path.relative_to(PYTHON).as_posix()
        for path in (PYTHON / "kimi_ops").rglob("*.py")
        if registering.search(path.read_text())
    }
    outside = {name for name in found if not name.startswith(OPERATORS)}
    assert found, "no operator is registered: the pattern has gone stale"
    assert not outside
