# SPDX-License-Identifier: MIT
"""Tries a wheel as a user meets it: a fresh environment, another torch, no tree and no compiler.

python tests/wheel.py dist/kimi_ops-*.whl torch==2.13.0
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/02_experts.py"
CODE = """
import importlib.metadata, torch, kimi_ops
version = importlib.metadata.version("kimi-ops")
assert kimi_ops.__version__ == version, f"the library says {kimi_ops.__version__}, not {version}"
gate = kimi_ops.topk_gate(torch.randn(64, 32), k=4)
assert gate.tokens_per_expert.sum() == 256
print(f"kimi_ops {version} with torch {torch.__version__}: {kimi_ops.__file__}")
"""


def check_contents(wheel: Path) -> None:
    """The library and its module, headers, types, the licence, and nobody's libraries."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for part in ("kimi_ops/libkimi_ops.so", "kimi_ops/include/kimi_ops.h", "kimi_ops/py.typed"):
        assert part in names, f"{wheel.name}: without {part}"
    assert any(name.startswith("kimi_ops/_C.cpython") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    libraries = [Path(name).name for name in names if ".so" in name]
    assert len(libraries) == 2, f"{wheel.name}: brings {libraries}"
    assert "-manylinux_" in wheel.name, f"{wheel.name}: for this machine alone"


def main(wheel: Path, torch: str) -> None:
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "venv/bin/python")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["PATH"] = f"{python.parent}:/nowhere"

        def run(*words: object) -> None:
            subprocess.run(list(map(str, words)), check=True, cwd=folder, env=environment)

        run(sys.executable, "-m", "venv", "venv")
        run(python, "-m", "pip", "install", "--quiet", torch, wheel)
        run(python, "-c", CODE)
        run(python.with_name("kimi-ops"), "info")
        run(python, EXAMPLE)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
