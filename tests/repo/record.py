# SPDX-License-Identifier: MIT
"""What must stay as it is. ``python -m tests.repo.record`` writes all of it anew, with the root and
``python/`` on PYTHONPATH; `git diff tests/repo` shows what changed."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.repo import messages

HERE = Path(__file__).resolve().parent
COMMAND = "PYTHONPATH=python:. python -m tests.repo.record"


def operators() -> list[str]:
    """The names in torch.ops.kimi_ops."""
    names = map(str, torch._C._dispatch_get_all_op_names())
    return sorted(n.removeprefix("kimi_ops::") for n in names if n.startswith("kimi_ops::"))


def load(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


def save(name: str, value: Any) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    save("messages", {case: messages.say(case) for case in load("messages")})
