# SPDX-License-Identifier: MIT
"""Which sources are measured."""

import hashlib
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / ".gpu"  # by device_check prepare; git ignores it, it travels beside the checkout
MANIFEST = "prepared.json"
BUILT_FROM = (
    "CMakeLists.txt", "cmake/*", "csrc/**/*", "tests/gpu/*.cu", "tests/simt/*",
    "benchmarks/device_check/*.cu",
)  # fmt: skip


def sources() -> str:
    """A hash of names and contents of what `device_check prepare` builds from."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in BUILT_FROM for path in ROOT.glob(pattern)}):
        if path.is_file():
            name, content = path.relative_to(ROOT).as_posix(), path.read_bytes()
            total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


def commit() -> str:
    """The commit of the checkout and whether files differ from it; without git what
    `device_check prepare` wrote down, or "unknown"."""
    try:
        head, changed = (
            subprocess.check_output(["git", *words], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        manifest = PREPARED / MANIFEST
        return json.loads(manifest.read_text())["commit"] if manifest.exists() else "unknown"
    return head.strip() + (" with changes" if changed.strip() else "")
