# SPDX-License-Identifier: MIT
"""The native module, by itself."""

try:
    from kimi_ops import _C
except ImportError as error:
    raise ImportError(
        f"kimi_ops: native module kimi_ops._C: expected beside {__file__}, could not be loaded "
        f"({error}); build it with `pip install .` (or `python setup.py build_ext --inplace` in "
        "the source tree) using this Python"
    ) from error

__all__ = ["_C"]
