# SPDX-License-Identifier: MIT
"""When the part of the package that works on torch's tensors is loaded: with torch.

`import kimi_ops` alone loads neither; with torch there, or as soon as it is, everything is, so that
``torch.ops.kimi_ops`` is registered in whatever order a program imports the two.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def attribute(name: str) -> Any:
    """A part of the package, or a public name."""
    package = sys.modules["kimi_ops"]
    if not name.startswith("_") and find_spec(f"kimi_ops.{name}"):
        # `from kimi_ops import formats` asks here first, in modules that public names wait for
        return import_module(f"kimi_ops.{name}")
    if name == "__all__" or not name.startswith("_"):
        public_names()
    if name not in vars(package):
        raise AttributeError(f"module 'kimi_ops' has no attribute {name!r}")
    return getattr(package, name)


def public_names() -> list[str]:
    """Those of kimi_ops._public, which all become the package's."""
    package, found = sys.modules["kimi_ops"], import_module("kimi_ops._public")
    if "__all__" not in vars(package):
        vars(package).update({known: getattr(found, known) for known in found.__all__})
        package.__all__ = found.__all__  # type: ignore[attr-defined]
    return found.__all__


def load_with_torch() -> None:
    if "torch" in sys.modules:
        public_names()
    else:
        sys.meta_path.insert(0, _AfterTorch())


class _AfterTorch(MetaPathFinder):
    """Sees who imports torch, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_load(module: ModuleType) -> None:
            execute(module)
            if not _is_loading():
                public_names()

        spec.loader.exec_module = execute_and_load  # type: ignore[method-assign]
        return spec


def _is_loading() -> bool:
    """Whether a module of ours is half loaded: it imports torch, and what it needs of the rest."""
    ours = (module for name, module in sys.modules.items() if name.startswith("kimi_ops."))
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)
