# SPDX-License-Identifier: MIT
"""Benchmarks: ``python -m benchmarks`` runs all, ``python -m benchmarks.bench_<op>`` one."""
