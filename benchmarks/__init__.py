# SPDX-License-Identifier: MIT
"""Benchmarks: ``python -m benchmarks`` runs all, ``python -m benchmarks.bench_<op>`` one."""

import os

# torch's profiler, which measures peak memory, tells stderr of every start and stop otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
