# SPDX-License-Identifier: MIT
"""Every benchmark, one after another, or those named by --only.

Each table says what a case takes and how often ours fits into a peer's time, both measured in this
run, in turns. `python -m benchmarks report` compares with every library that is installed, on one
page.
"""

import importlib
import sys

from benchmarks.options import BENCHMARKS, parse, parser
from benchmarks.session import Session


def main(arguments: list[str] | None = None) -> Session:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        return importlib.import_module("benchmarks.comparison.run").main(arguments[1:])
    options = parse(parser("benchmarks", __doc__ or ""), arguments)
    session = Session(options)
    for name in options.only or BENCHMARKS:
        importlib.import_module(f"benchmarks.bench_{name}").compare(session)
    session.finish()
    return session


if __name__ == "__main__":
    main()
