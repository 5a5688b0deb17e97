# SPDX-License-Identifier: MIT
"""Every benchmark, one after another: ``python -m benchmarks [--only topk_gate] [options]``.

With --json or --plot the op's name goes into the file's name.
"""

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> None:
    given = sys.argv[1:]
    only = given[given.index("--only") + 1] if "--only" in given else None
    if only is not None:
        if f"bench_{only}" not in NAMES:
            known = ", ".join(name.removeprefix("bench_") for name in NAMES)
            sys.exit(f"benchmarks: --only: expected one of {known}, got {only}")
        at = given.index("--only")
        del given[at : at + 2]
    for name in NAMES:
        if only is None or name == f"bench_{only}":
            module = importlib.import_module(f"benchmarks.{name}")
            module.main(_own_files(given, name.removeprefix("bench_")))
            print()


def _own_files(given: list[str], op: str) -> list[str]:
    own = list(given)
    for flag in ("--json", "--plot"):
        if flag in own:
            path = Path(own[own.index(flag) + 1])
            own[own.index(flag) + 1] = str(path.with_name(f"{path.stem}_{op}{path.suffix}"))
    return own


if __name__ == "__main__":
    main()
