# SPDX-License-Identifier: MIT
"""What must stay as it is. ``python -m tests.repo.record`` writes all of it anew, with the root and
``python/`` on PYTHONPATH; `git diff tests/repo` shows what changed. Engines that this machine lacks
keep their records of outputs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.repo import interfaces, messages, outputs

HERE = Path(__file__).resolve().parent
COMMAND = "PYTHONPATH=python:. python -m tests.repo.record"


def engine_outputs() -> dict[str, dict[str, str]]:
    """{engine: {case: digest}}, of the engines that this machine has or that are on record."""
    sys.path.insert(0, str(HERE.parent))
    import conftest

    found = load_outputs() if (HERE / "outputs.json").exists() else {}
    for engine in outputs.CPU + outputs.SIMT:
        if not conftest._skip_reason(engine):
            with conftest._engine(engine):
                found[engine] = outputs.digests(engine)
    return found


def load_outputs() -> dict[str, dict[str, str]]:
    """{engine: {case: digest}} of outputs.json, which holds {case: {digest: its engines}}."""
    found: dict[str, dict[str, str]] = {}
    for name, digests in load("outputs").items():
        for digest, engines in digests.items():
            for engine in engines.split():
                found.setdefault(engine, {})[name] = digest
    return found


def save_outputs(found: dict[str, dict[str, str]]) -> None:
    rows: dict[str, dict[str, str]] = {name: {} for name in outputs.CASES}
    for engine, digests in found.items():
        for name in rows.keys() & digests.keys():
            rows[name][digests[name]] = f"{rows[name].get(digests[name], '')} {engine}".strip()
    save("outputs", rows)


def load(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


def save(name: str, record: dict[str, Any]) -> None:
    """A line for each key."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    save("messages", {case: messages.say(case) for case in load("messages")})
    save("schemas", interfaces.schemas())
    save("layouts", interfaces.layouts())
    save("states", interfaces.states())
    save_outputs(engine_outputs())
