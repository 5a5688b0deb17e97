# SPDX-License-Identifier: MIT
"""This library beside what is installed on a machine: ``python -m benchmarks report``."""
