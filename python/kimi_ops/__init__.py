# SPDX-License-Identifier: MIT
"""Hand-written kernels of a Kimi-K2-class mixture-of-experts model as drop-in PyTorch ops.

Every op has one name: ``kimi_ops.topk_gate``, ``torch.ops.kimi_ops.topk_gate``, in plain torch
``kimi_ops.reference.topk_gate.topk_gate``, in C ``kimi_topk_gate()``. The reference model is in
``kimi_ops.models.kimi_k2``. ``kimi_ops.numpy`` and ``kimi_ops.jax`` load no torch.
"""

from typing import TYPE_CHECKING, Any

from kimi_ops import _program  # isort: skip  (before torch is loaded)
from kimi_ops import _lazy
from kimi_ops._library import _C
from kimi_ops.building import get_cmake_dir as get_cmake_dir
from kimi_ops.building import get_include as get_include
from kimi_ops.building import get_pkgconfig_dir as get_pkgconfig_dir

if TYPE_CHECKING:
    from kimi_ops._public import *  # noqa: F403
    from kimi_ops._public import __all__ as __all__

del _program, TYPE_CHECKING
__version__ = _C.version()


def __getattr__(name: str) -> Any:
    return _lazy.attribute(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_lazy.public_names()})


_lazy.load_with_torch()
