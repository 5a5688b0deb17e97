# SPDX-License-Identifier: MIT
"""Where this installation keeps what C and C++ builds need (docs/c.md)."""

from pathlib import Path

__all__ = ["get_cmake_dir", "get_include", "get_pkgconfig_dir"]


def _folder(name: str, file: str) -> str:
    folder = Path(__file__).parent / name
    if not (folder / file).exists():
        raise FileNotFoundError(
            f"kimi_ops: {name}: expected {folder / file}, which this build has not installed; "
            "build with `pip install .` or `python setup.py build_ext --inplace`"
        )
    return str(folder)


def get_include() -> str:
    """The folder of ``kimi_ops.h``.

    Examples
    --------
    >>> import kimi_ops
    >>> kimi_ops.get_include().endswith("include")
    True
    """
    return _folder("include", "kimi_ops.h")


def get_cmake_dir() -> str:
    """The folder for ``-Dkimi_ops_DIR=`` of CMake, whose ``find_package(kimi_ops)`` looks there.

    Examples
    --------
    >>> import kimi_ops
    >>> kimi_ops.get_cmake_dir().endswith("cmake")
    True
    """
    return _folder("cmake", "kimi_opsConfig.cmake")


def get_pkgconfig_dir() -> str:
    """The folder for ``PKG_CONFIG_PATH``, with ``kimi_ops.pc``.

    Examples
    --------
    >>> import kimi_ops
    >>> kimi_ops.get_pkgconfig_dir().endswith("pkgconfig")
    True
    """
    return _folder("pkgconfig", "kimi_ops.pc")
