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
from types import ModuleType
from typing import Any

WITHOUT_TORCH = {"building", "jax", "numpy"}  # parts of the package that do without


def public(name: str) -> Any:
    """A public name, from kimi_ops._public, whose names all become the package's."""
    package, found = sys.modules["kimi_ops"], import_module("kimi_ops._public")
    if "__all__" not in vars(package):
        vars(package).update({known: getattr(found, known) for known in found.__all__})
        package.__all__ = found.__all__  # type: ignore[attr-defined]
    if name not in vars(package):
        raise AttributeError(f"module 'kimi_ops' has no attribute {name!r}")
    return getattr(package, name)


def load_with_torch() -> None:
    if "torch" in sys.modules:
        public("__all__")
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
                public("__all__")

        spec.loader.exec_module = execute_and_load  # type: ignore[method-assign]
        return spec


def _is_loading() -> bool:
    """Whether a module of ours is half loaded: it imports torch, and what it needs of the rest."""
    ours = (module for name, module in sys.modules.items() if name.startswith("kimi_ops."))
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)
