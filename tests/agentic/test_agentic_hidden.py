# SPDX-License-Identifier: MIT
"""What a "tell" is worth is known to `evaluate` alone: no module that trains leads to it."""

import ast
from pathlib import Path

import pytest

import kimi_ops

ROOT = Path(kimi_ops.__file__).parents[1]
KNOWING = {f"kimi_ops.agentic.{name}" for name in ("evaluate", "study")}


def modules() -> set[str]:
    """Of agentic post-training, with the packages they lie in."""
    files = (ROOT / "kimi_ops" / "agentic").glob("*.py")
    return {named(path) for path in files}


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def reads(source: str, known: set[str], package: str = "kimi_ops.agentic") -> set[str]:
    """Those of the known modules that a source of `package` names: by an import of any form, by an
    attribute, or in a string of its own."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            named |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            named.add(ast.unparse(node))
        elif isinstance(node, ast.Constant):
            named.add(str(node.value))
    return named & known


@pytest.mark.parametrize(
    "source",
    [
        "from kimi_ops.agentic.evaluate import told_value",
        "from kimi_ops.agentic import evaluate",
        "from kimi_ops.agentic import evaluate as score, judge",
        "import kimi_ops.agentic.evaluate",
        "import kimi_ops.agentic.evaluate as score",
        "from . import evaluate",
        "from .evaluate import told_value",
        "from ..agentic.evaluate import told_value",
        "def late():\n    from kimi_ops.agentic import evaluate",
        "import kimi_ops.agentic\nkimi_ops.agentic.evaluate.told_value",
        "importlib.import_module('kimi_ops.agentic.evaluate')",
        "__import__('kimi_ops.agentic.evaluate')",
    ],
)
def test_every_form_of_import_is_seen(source):
    assert reads(source, modules()) - {"kimi_ops.agentic", "kimi_ops.agentic.judge"} == {
        "kimi_ops.agentic.evaluate"
    }


def test_no_module_of_training_leads_to_the_evaluator():
    """From all that trains: the stages of the command, whatever they take."""
    known = modules()
    reached, waiting = set[str](), {"kimi_ops.agentic.stages", "kimi_ops.agentic.critic"}
    while waiting:
        reached.add(name := waiting.pop())
        path = ROOT / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        waiting |= reads(file.read_text(), known) - reached
    names = {name.rpartition(".")[2] for name in reached}
    assert {"stages", "rl", "sft", "synthesis", "critic", "judge", "objective", "rollout"} <= names
    assert known >= KNOWING and not KNOWING & reached
