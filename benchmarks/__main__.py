# SPDX-License-Identifier: MIT
"""Every benchmark, one after another, or those named by --only.

Each table says what a case takes and how often ours fits into a peer's time, both measured in this
run, in turns.
"""

import importlib

from benchmarks.options import BENCHMARKS, parse, parser
from benchmarks.session import Session


def main(arguments: list[str] | None = None) -> Session:
    options = parse(parser("benchmarks", __doc__ or ""), arguments)
    session = Session(options)
    for name in options.only or BENCHMARKS:
        importlib.import_module(f"benchmarks.bench_{name}").compare(session)
    session.finish()
    return session


if __name__ == "__main__":
    main()
