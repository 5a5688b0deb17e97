# SPDX-License-Identifier: MIT
"""What the programs want settled before torch is loaded; in any other process, nothing.

The package loads torch, and torch loads libgomp, which reads its environment there and then: a
program's own first line comes too late. So this module is the package's first import, and looks at
how the process was started.
"""

import os
import signal
import sys
from pathlib import PurePath

INTERRUPTED = 130  # exit status of a program that Ctrl-C ended

# libgomp's threads wait for the next loop by spinning, for some 10 ms by default; beside another
# busy process they spin on the very core that the work waits for. This many turns bridge the gaps
# between two ops (docs/threads.md has the figures).
SPIN_COUNT = "2000"


def is_program() -> bool:
    """Whether this process is ``kimi-ops``, the installed script, or ``python -m kimi_ops``."""
    if sys.argv[:1] == ["-m"]:  # the module is still being looked up
        words = sys.orig_argv
        return "-m" in words and words[words.index("-m") + 1] == "kimi_ops"
    return bool(sys.argv) and PurePath(sys.argv[0]).stem == "kimi-ops"


def prepare() -> None:
    """Short spins unless the user chose, no log lines of torch's profiler, a quiet Ctrl-C."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # above its errors and stages
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # until the command line is read there is nothing to save and nobody to catch an exception
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))


def ready() -> None:
    """Everything is loaded: from here on Ctrl-C is an exception again."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_program():
    prepare()
